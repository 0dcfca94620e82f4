"""What a run is asked to do: one frozen config, checked before anything is loaded."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from gradjax.errors import GradjaxError, did_you_mean
from gradjax.structs import ATTENTION, PROJECTIONS, Projection

# Standard deviations, of what length leaves of a statistic, that are of no importance.
NEGLIGIBLE = 0.1

PromptFormat = Literal["plain", "chat"]
Truncation = Literal["right", "drop", "error"]
Dtype = Literal["float32", "bfloat16"]
SpectrumMethod = Literal["factored", "dense"]
SpectrumRoute = Literal["auto", "gram", "qr"]
LayerPairs = Literal["adjacent", "all", "none"]
ProcessKind = Literal["independent", "sharded"]
PreferenceField = Literal["chosen", "rejected"]

TEXT_SETTINGS = ("columns", "field", "response_marker")  # of `Reading`: which texts a row has
_COLUMN_NAMES = (
    "instruction", "input", "output", "system", "history", "messages", "conversations",
    "prompt", "text", "chosen", "rejected",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reading:
    """How data sources are read, beyond what is found without being told.

    Raises:
      GradjaxError: naming the flag, what was found and what was expected.
    """

    columns: tuple[str, ...] = ()  # NAME=COLUMN
    field: PreferenceField | None = None  # of preference pairs
    response_marker: str | None = None  # what the response in a text comes after
    data_revision: str | None = None  # of Hub data sets
    strict: bool = False  # refuse a file with a line that cannot be read

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        for spec in self.columns:
            name, _, column = spec.partition("=")
            if name not in _COLUMN_NAMES or not column:
                raise GradjaxError(
                    f"--columns={spec}: expected NAME=COLUMN, where NAME is one of "
                    f"{', '.join(_COLUMN_NAMES)}{did_you_mean(name, _COLUMN_NAMES)}"
                )
        if self.field is not None:
            _require_choice("field", self.field, get_args(PreferenceField))
        if self.response_marker == "":
            raise GradjaxError("--response_marker is empty: expected what responses come after")

    @property
    def names(self) -> dict[str, str]:
        """Columns by standard name."""
        pairs = (spec.partition("=") for spec in self.columns)
        return {name: column for name, _, column in pairs}

    @property
    def texts(self) -> dict[str, Any]:
        """What the texts of a row depend on; empty where they are found without being told."""
        values = {name: getattr(self, name) for name in TEXT_SETTINGS}
        return {n: list(v) if n == "columns" else v for n, v in values.items() if v}

    def settings(self) -> dict[str, Any]:
        """What rows depend on, for a manifest; empty by default."""
        revision = {"data_revision": self.data_revision} if self.data_revision else {}
        return self.texts | revision

    def inherit(self, before: "Reading", flag: str) -> "Reading":
        """This, with the texts of an earlier reading of the same rows, unless told otherwise.

        Raises:
          GradjaxError: if it is told to read other texts.
        """
        if self.texts not in ({}, before.texts):
            raise GradjaxError(
                f"{flag} was read with {before.texts or 'no --columns, --field or marker'}, found "
                f"{self.texts}: give the same, or leave them out"
            )
        return dataclasses.replace(before, data_revision=self.data_revision, strict=self.strict)


@dataclasses.dataclass(frozen=True)
class TokenConfig:
    """How examples become tokens.

    Raises:
      GradjaxError: naming the flag, what was found and what was expected.
    """

    prompt_format: PromptFormat = "plain"
    max_length: int = 4096  # tokens
    truncation: Truncation = "right"
    target_tokens: int | None = None  # cut every response to its first N tokens

    def __post_init__(self) -> None:
        _require_choice("prompt_format", self.prompt_format, get_args(PromptFormat))
        _require_choice("truncation", self.truncation, get_args(Truncation))
        _require_at_least("max_length", self.max_length, 2)
        _require_at_least("target_tokens", self.target_tokens, 1)


@dataclasses.dataclass(frozen=True)
class SpectraConfig:
    """What is measured on an example's gradients, and how.

    Raises:
      GradjaxError: naming the flag, what was found and what was expected.
    """

    spectrum: SpectrumMethod = "factored"
    spectrum_route: SpectrumRoute = "auto"
    layers: str = "all"
    projections: tuple[Projection, ...] = ATTENTION
    similarity: LayerPairs = "adjacent"

    def __post_init__(self) -> None:
        _require_choice("spectrum", self.spectrum, get_args(SpectrumMethod))
        _require_choice("spectrum_route", self.spectrum_route, get_args(SpectrumRoute))
        _require_choice("similarity", self.similarity, get_args(LayerPairs))
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise GradjaxError(
                f"--projections={','.join(self.projections)}: expected some of "
                f"{','.join(PROJECTIONS)}, each at most once"
            )
        for projection in self.projections:
            _require_choice("projections", projection, PROJECTIONS)
        # The store's order, whatever the order asked for.
        ordered = tuple(p for p in PROJECTIONS if p in self.projections)
        object.__setattr__(self, "projections", ordered)
        if not re.fullmatch(r"all|\d+(-\d+)?(,\d+(-\d+)?)*", self.layers):
            raise GradjaxError(
                f"--layers={self.layers}: expected `all` or numbers and ranges from 0, as in 0-5,8"
            )

    def layer_numbers(self, num_layers: int) -> tuple[int, ...]:
        """The chosen layers of a model with `num_layers`, ascending.

        Raises:
          GradjaxError: if a layer is beyond the model's last.
        """
        if self.layers == "all":
            return tuple(range(num_layers))
        chosen: set[int] = set()
        for part in self.layers.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not span or span[-1] >= num_layers:
                raise GradjaxError(
                    f"--layers={self.layers}: {part} is not within this model's layers, "
                    f"0 to {num_layers - 1}"
                )
            chosen.update(span)
        return tuple(sorted(chosen))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run of `gradjax spectra`.

    Raises:
      GradjaxError: naming the flag, what was found and what was expected.
    """

    model: str = "demo"
    data: tuple[str, ...] = ("demo",)
    output_dir: Path | str | None = None  # a URL stays str; None: runs/{model}
    tokens: TokenConfig = dataclasses.field(default_factory=TokenConfig)
    auto_target_tokens: bool = False  # as many as 90 % of each group have
    spectra: SpectraConfig = dataclasses.field(default_factory=SpectraConfig)
    limit: int | None = None  # rows per group
    dtype: Dtype = "float32"
    batch_tokens: int | None = None  # per device; None: by backend
    mesh: str | None = None  # data:4,fsdp:2; None: all devices, by what fits
    processes: ProcessKind = "independent"
    coordinator_address: str | None = None  # HOST:PORT or auto; None: a single process
    num_processes: int | None = None
    process_id: int | None = None
    random_init: bool = False
    seed: int = 0
    store_singular_values: bool = True
    overwrite: bool = False
    revision: str | None = None  # of a model on the Hub
    reading: Reading = dataclasses.field(default_factory=Reading)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        if self.output_dir is not None:
            object.__setattr__(self, "output_dir", as_directory(self.output_dir))
        _require_choice("dtype", self.dtype, get_args(Dtype))
        for name in ("limit", "batch_tokens"):
            _require_at_least(name, getattr(self, name), 1)
        _require_at_least("seed", self.seed, 0)
        _require_choice("processes", self.processes, get_args(ProcessKind))
        self._require_processes()

    @property
    def settings(self) -> dict[str, Any]:
        """What numbers depend on, of what is known before anything is read; for a manifest."""
        reading = self.reading.settings()
        return {
            "dtype": self.dtype,
            **dataclasses.asdict(self.tokens),
            "spectrum": self.spectra.spectrum,
            "projections": list(self.spectra.projections),
            "similarity": self.spectra.similarity,
            "store_singular_values": self.store_singular_values,
            **({"reading": reading} if reading else {}),
        }

    def _require_processes(self) -> None:
        numbers = (self.num_processes, self.process_id)
        if self.coordinator_address in (None, "auto"):
            if numbers != (None, None):
                raise GradjaxError(
                    "--num_processes and --process_id: expected only with --coordinator_address="
                    f"HOST:PORT, found {self.coordinator_address or 'none'}"
                )
            return
        if None in numbers or not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            raise GradjaxError(
                f"--coordinator_address={self.coordinator_address}: expected with it the same "
                "--num_processes=N for all and --process_id from 0 to N-1, found "
                f"{self.num_processes} and {self.process_id}"
            )


Settings = TypeVar("Settings")


def select(kind: type[Settings], values: Mapping[str, Any], **parts: Any) -> Settings:
    """A settings class filled from values by name; those of other classes are left alone."""
    names = [field.name for field in dataclasses.fields(cast(Any, kind))]
    own = {name: values[name] for name in names if name in values}
    return kind(**own, **parts)


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise GradjaxError(
            f"--{name}={value}: expected one of {', '.join(choices)}"
            f"{did_you_mean(str(value), choices)}"
        )


def _require_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise GradjaxError(f"--{name}={value}: expected a number of at least {least}")


def as_directory(directory: str | Path) -> str | Path:
    """What a user gave as a directory: a URL as it is, a path with its `~` expanded."""
    if isinstance(directory, str):
        directory = directory.removeprefix("file://")
        if "://" in directory:
            return directory.rstrip("/")
    return Path(directory).expanduser()
