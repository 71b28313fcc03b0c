"""The model of one process, loaded by another: the same weights under the same versions, or none."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import get_args

from ..errors import UserError
from ..model.loading import quiet_load, resolve_source
from ..model.points import HookedModel, hf_config, is_from_files
from ..model.provenance import ModelRecord, describe_model, is_embedded, parameters_fingerprint, versions
from ..options import Quantization


@dataclass(frozen=True)
class SameModel:
    """Which model another process is to load, and what it must find."""

    record: ModelRecord
    versions: Mapping[str, str]
    parameters: str
    """Fingerprint of the parameters as they are now, which may have been edited since they were loaded."""

    @classmethod
    def of(cls, model: HookedModel) -> "SameModel":
        """What is loaded here.

        Raises:
            UserError: no other process could load it.
        """
        if not is_from_files(model):
            raise UserError(
                "this model was given as an object, which no other process has: save it, and load it by its "
                "directory; or use no engine (--engine local)"
            )
        record = describe_model(model, str(hf_config(model)._name_or_path))
        if record.is_split:
            raise UserError("a model that is split over devices has no copies: use no engine (--engine local)")
        return cls(record, versions(), parameters_fingerprint(model))

    def load(self) -> HookedModel:
        """The same model in this process.

        Raises:
            UserError: it is not there, or other versions or weights are.
        """
        here = versions()
        for package, version in self.versions.items():
            if here.get(package) != version:
                raise UserError(
                    f"a worker has {package} {here.get(package)}, and this process {version}: install the same "
                    "versions on every machine"
                )
        asked = self.record
        source = None if is_embedded(asked.source) else asked.source
        model = quiet_load(
            source,
            revision=asked.revision,
            device=asked.device.partition(":")[0],
            dtype=asked.dtype,
            quantization=asked.quantization if asked.quantization in get_args(Quantization) else None,
            trust_remote_code=asked.remote_code,
        )
        found = replace(describe_model(model, resolve_source(source)), source=asked.source, device=asked.device)
        for what, value in asdict(found).items():
            expected = getattr(asked, what)
            if value != expected:
                raise UserError(
                    f"a worker finds another model than this process as {asked.source}: its {what} is "
                    f"{str(value)[:12]}, not {str(expected)[:12]}"
                )
        if parameters_fingerprint(model) != self.parameters:
            raise UserError(
                f"the parameters of this model are not those of {asked.source}: they were edited after they were "
                "loaded, which no other process knows of; save the model, or use no engine (--engine local)"
            )
        return model
