"""A run folder as one self-contained page: `write_report(folder)`."""

from .page import identity_of as identity_of
from .page import list_combinations as list_combinations
from .page import write_report as write_report
