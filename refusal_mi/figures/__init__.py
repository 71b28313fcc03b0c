"""Figures from results: `plot_x(result) -> plotly Figure`; no model, no disk."""

from ..run.answers import Effect as Effect
from ..run.answers import SideEffects as SideEffects
from .effects import plot_losses as plot_losses
from .effects import plot_rates as plot_rates
from .scores import Measure as Measure
from .scores import plot_norms as plot_norms
from .scores import plot_score_lines as plot_score_lines
from .scores import plot_score_panels as plot_score_panels
from .scores import plot_scores as plot_scores
