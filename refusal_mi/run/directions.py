"""The directions that a path names: of a run folder, by rank or the chosen one, or of a file."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..directions import Direction, load_direction, load_vector
from ..errors import UserError
from ..files import floats, read_record, read_tensors
from ..interventions import check_width
from ..options import rank_numbers
from .folder import load_ranked
from .record import DIRECTION, MEANS, SPAN, CombinationRecord


def read_directions(
    source: Path,
    n_layers: int,
    ranks: str | None = None,
    layer: int | None = None,
    *,
    moves: bool = False,
    hook: str | None = None,
) -> list[Direction | Tensor]:
    """The directions of a file or a run folder; for ablation also a vector of which nothing says where it was read.

    Args:
        source: a `.pt` file, or a run folder.
        n_layers: of the model that they are used in.
        ranks: of a run folder's candidates, best is 0: "0-2" is ranks 0 and 2.
        layer: and `moves` and `hook`, as `directions.load_direction` takes them; what does not move is ablated.

    Raises:
        UserError: there is no such file, run or rank, or it is the folder of a combination, which its run stands for.
    """
    folder = source if source.is_dir() else source.parent
    if (folder / SPAN).is_file():
        combination = read_record(folder / SPAN, CombinationRecord)
        way_out = f"--direction {folder.parent} --directions {'-'.join(map(str, combination.ranks))}"
        if combination.multi == "sequential":
            raise UserError(
                f"{source} ablates one direction after the other, which hooks can do and weights or a vector cannot; "
                f"the span of the same directions can be exported: {way_out}"
            )
        raise UserError(f"{source} holds a combination of directions of a run: export it with {way_out}")
    if source.is_dir():
        if ranks is not None:
            if (layer is not None and not moves) or hook is not None:
                said = hook if hook is not None else f"layer {layer}"
                raise UserError(f"{source} says itself where its candidates were read: leave {said} out")
            return list(load_ranked(source, rank_numbers(ranks)))
        if not (source / DIRECTION).is_file():
            raise UserError(f"{source} has no {DIRECTION}: finish the run with refusal-mi run, or name another run")
        return [load_direction(source / DIRECTION, n_layers, layer, moves=moves, hook=hook)]
    if ranks is not None:
        raise UserError(f"--directions ranks the candidates of a run folder, and {source} is not a folder")
    if moves:
        return [load_direction(source, n_layers, layer, moves=True, hook=hook)]
    return [load_vector(source, n_layers, layer, hook=hook)]


def harmless_components(source: Path, directions: Sequence[Direction | Tensor]) -> list[float]:
    """Per direction, the component along it of the harmless mean at its own layer and position.

    Raises:
        UserError: the source is no run folder with means, or a direction does not say where it was read.
    """
    folder = source if source.is_dir() else source.parent
    if not (folder / MEANS).is_file():
        raise UserError(f"--affine harmless-mean needs a run folder with {MEANS}, and {folder} has none; give a number")
    held = read_tensors(folder / MEANS)
    means = floats(folder / MEANS, held.get("harmless") if isinstance(held, dict) else held, None, None, None).double()
    lengths = []
    for direction in directions:
        position = direction.position if isinstance(direction, Direction) else None
        if not isinstance(direction, Direction) or position is None or not -means.shape[0] <= position < 0:
            raise UserError("--affine harmless-mean needs directions that say at which prompt position they were read")
        if not 0 <= direction.layer < means.shape[1]:
            raise UserError(f"there is no harmless mean at layer {direction.layer}; give a number")
        check_width(len(direction.vector), means.shape[2])
        lengths.append((means[position, direction.layer] @ direction.unit).item())
    return lengths
