"""config.json -> DecoderConfig. Every attribute is understood, or the model is refused.

An attribute is handled here, listed as harmless, or must have the one value that this
decoder implements. Missing attributes have the defaults of transformers' config classes.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig, LinearScaling, RopeScaling, ScoreHead

# Bookkeeping, training and generation: no effect on the logits of a given weight and text.
# Names that begin with an underscore or end in _token_id are harmless, too.
# fmt: off
HARMLESS = frozenset({
    "attention_dropout", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "cache_implementation", "chunk_size_feed_forward", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "generation_config", "id2label", "initializer_range", "is_llama_config",
    "label2id", "length_penalty", "max_length", "max_new_tokens", "max_sequence_length",
    "min_length", "model_max_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
})
# fmt: on


def _is_harmless(name: str) -> bool:
    return name in HARMLESS or name.startswith("_") or name.endswith("_token_id")


# Attributes that would change the decoder, with the values that it implements.
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "auto_map": (None,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "per_layer_config": (None,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
}

_SHARED_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


class Attributes:
    """One JSON object, read attribute by attribute; problems are collected, not raised."""

    def __init__(self, values: dict[str, Any], defaults: dict[str, Any], prefix: str = ""):
        self.values, self.defaults, self.prefix = values, defaults, prefix
        self.seen: set[str] = set()
        self.problems: dict[str, str] = {}  # by name: one attribute may be read twice

    def get(self, name: str) -> Any:
        """The attribute as it stands, or its default."""
        self.seen.add(name)
        return self.values.get(name, self.defaults.get(name))

    def refuse(self, name: str, supported: str) -> None:
        """Note an attribute with a value that this decoder does not implement."""
        found = json.dumps(self.values[name]) if name in self.values else "missing"
        name = f"{self.prefix}{name}"
        self.problems.setdefault(name, f"{name} is {found} (supported: {supported})")

    def integer(self, name: str) -> int:
        """A positive integer."""
        value = self.get(name)
        if type(value) is int and value > 0:
            return value
        self.refuse(name, "a positive integer")
        return 1

    def optional_integer(self, name: str) -> int | None:
        """A positive integer or null."""
        return None if self.get(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        """A positive finite number."""
        value = self.get(name)
        if type(value) in (int, float) and 0 < value < 2**63:
            return float(value)
        self.refuse(name, "a positive number")
        return 1.0

    def optional_number(self, name: str) -> float | None:
        """A positive finite number or null."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.get(name)
        if type(value) is not bool:
            self.refuse(name, "true or false")
        return value is True

    def fixed(self, name: str, allowed: tuple[Any, ...]) -> None:
        """An attribute that may be missing, or must have one of the given values."""
        self.seen.add(name)
        if name in self.values and self.values[name] not in allowed:
            self.refuse(name, " or ".join(map(json.dumps, allowed)))

    def refuse_unread(self, supported: str) -> None:
        """Note every attribute that nothing above has asked for."""
        for name in sorted(self.values.keys() - self.seen):
            if not _is_harmless(name):
                self.refuse(name, supported)


@dataclasses.dataclass(frozen=True)
class _Family:
    """What an architecture's name implies."""

    name: str  # its model_type
    defaults: dict[str, Any]  # of transformers' config class
    # Fields of `DecoderConfig` that every model of the family has alike.
    traits: dict[str, Any] = dataclasses.field(default_factory=dict)
    windowed: Callable[[Attributes, int], list[bool]] = lambda _, layers: [False] * layers
    fixed: dict[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: {"hidden_act": ("silu",)}
    )
    ignored: frozenset[str] = frozenset()  # attributes that published configs carry to no effect


def _upper_layers(a: Attributes, layers: int) -> list[bool]:
    """Qwen's: from max_window_layers on, if windows are used at all."""
    first = a.get("max_window_layers")
    if type(first) is not int or first < 0:
        a.refuse("max_window_layers", "an integer from 0")
        first = 0
    used = a.flag("use_sliding_window")
    return [used and layer >= first for layer in range(layers)]


def _all_layers(a: Attributes, layers: int) -> list[bool]:
    return [True] * layers


def _even_layers(a: Attributes, layers: int) -> list[bool]:
    return [layer % 2 == 0 for layer in range(layers)]


def _all_but_every_sixth(a: Attributes, layers: int) -> list[bool]:
    """Gemma 3's: so many local layers, then a global one."""
    names = ("_sliding_window_pattern", "sliding_window_pattern")  # of transformers 5 and 4
    a.seen.update(names)
    every = a.integer(next((name for name in names if name in a.values), names[1]))
    return [(layer + 1) % every != 0 for layer in range(layers)]


_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
}
_OLMO: dict[str, Any] = _LLAMA | {"vocab_size": 50304}
_GEMMA: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_TRAITS: dict[str, Any] = {
    "norm": "rms_float32",
    "norm_offset": 1.0,
    "post_norms": True,
    "activation": "gelu_tanh",
}
_GELU = dict.fromkeys(["hidden_activation", "hidden_act"], ("gelu_pytorch_tanh",))
_FAMILIES = {
    "Qwen2ForCausalLM": _Family("qwen2", _QWEN, {"qkv_bias": True}, _upper_layers),
    "Qwen3ForCausalLM": _Family(
        "qwen3", _QWEN | {"head_dim": 128}, {"qk_norm": "head"}, _upper_layers
    ),
    "LlamaForCausalLM": _Family(
        "llama", _LLAMA, fixed={"hidden_act": ("silu",), "sliding_window": (None,)}
    ),
    "MistralForCausalLM": _Family(
        "mistral",
        defaults=_LLAMA
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        windowed=_all_layers,
        ignored=frozenset({"layer_types"}),
    ),
    "OlmoForCausalLM": _Family(
        "olmo", _OLMO | {"clip_qkv": None}, {"norm": "layer", "norm_eps": 1e-5}
    ),
    "Olmo2ForCausalLM": _Family(
        "olmo2",
        _OLMO | {"rms_norm_eps": 1e-5},
        {"norm": "rms_float32", "qk_norm": "all", "pre_norms": False, "post_norms": True},
    ),
    "Gemma2ForCausalLM": _Family(
        "gemma2",
        defaults=_GEMMA
        | {
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        traits=_GEMMA_TRAITS,
        windowed=_even_layers,
        fixed=_GELU,
        ignored=frozenset({"sliding_window_size"}),
    ),
    "Gemma3ForCausalLM": _Family(
        "gemma3_text",
        defaults=_GEMMA
        | {
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        traits=_GEMMA_TRAITS | {"qk_norm": "head"},
        windowed=_all_but_every_sixth,
        fixed=_GELU,
    ),
}
_REWARD_FAMILIES = {"LlamaForSequenceClassification": _FAMILIES["LlamaForCausalLM"]}


def read_config(directory: Path, *, reward: bool = False) -> DecoderConfig:
    """The decoder that `directory/config.json` describes: with `reward`, one with a score head.

    Raises GradjaxError where the file is missing or malformed, the architecture is none of those
    listed above (with `reward`, not LlamaForSequenceClassification), or an attribute is unknown or
    has a value that this decoder does not implement; all such attributes are named.
    """
    path = Path(directory) / "config.json"
    values = read_json_object(path)
    family = _family(path, values, reward)
    attributes = Attributes(values, _SHARED_DEFAULTS | family.defaults)
    config = _decoder_config(attributes, family, reward)
    if attributes.problems:
        raise GradjaxError(
            f"{path}: this decoder does not implement what the config asks for: "
            f"{'; '.join(attributes.problems.values())}: use a checkpoint with supported values, "
            "or remove from config.json what does not change the model's logits."
        )
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's config.json; raises GradjaxError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GradjaxError(
            f"{path.parent} has no config.json: give a Hugging Face checkpoint directory "
            "(config.json, *.safetensors, tokenizer.json) as --model."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise GradjaxError(
            f"{path} cannot be read as JSON ({error}): download or save it again."
        ) from error
    if not isinstance(values, dict):
        raise GradjaxError(
            f"{path} holds a JSON {type(values).__name__}, expected an object of model attributes: "
            "download or save it again."
        )
    return values


def _family(path: Path, values: dict[str, Any], reward: bool) -> _Family:
    families = _REWARD_FAMILIES if reward else _FAMILIES
    architectures = values.get("architectures")
    match architectures:
        case [str(name)] if name in families:
            family = families[name]
        case [str(name)] if name in _REWARD_FAMILIES:
            raise GradjaxError(
                f"{path}: architectures is {json.dumps(architectures)}, a reward model, which has "
                "no next-token head: use it as --reward_model."
            )
        case _ if reward:
            raise GradjaxError(
                f"{path}: architectures is {json.dumps(architectures)}, expected "
                f"{', '.join(families)}: use a reward model, which has a score head, as "
                "--reward_model."
            )
        case _:
            raise GradjaxError(
                f"{path}: architectures is {json.dumps(architectures)}, expected one of "
                f"{', '.join(families)}: use a checkpoint of one of these families."
            )
    if values.get("model_type", family.name) != family.name:
        raise GradjaxError(
            f"{path}: model_type is {json.dumps(values['model_type'])} but architectures is "
            f"{json.dumps(architectures)}, which is {family.name}: correct the one that is wrong."
        )
    return family


def _decoder_config(a: Attributes, family: _Family, reward: bool) -> DecoderConfig:
    a.seen |= family.ignored | {"architectures", "model_type"}
    for name, allowed in (FIXED | family.fixed).items():
        a.fixed(name, allowed)
    known = _SHARED_DEFAULTS | family.defaults
    num_layers = a.integer("num_hidden_layers")
    num_heads, num_kv_heads, head_dim = _heads(a)
    windows = _windows(a, family, num_layers)
    ropes: dict[str, Any] = {}
    if "rope_local_base_freq" in known:
        ropes["window_rope_theta"] = _window_rope(a)
    ropes["rope_theta"], ropes["rope_scaling"] = _rope(a)
    own: dict[str, Any] = {"activation": "silu", "qkv_bias": False} | ropes
    if "norm_eps" not in family.traits:
        own["norm_eps"] = a.number("rms_norm_eps")
    if "clip_qkv" in known:
        own["qkv_clip"] = a.optional_number("clip_qkv")
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    caps |= {name: a.optional_number(name) for name in caps if name in known}
    hidden_size, scaled = a.integer("hidden_size"), "query_pre_attn_scalar" in known
    config = DecoderConfig(
        family=family.name,
        vocab_size=a.integer("vocab_size"),
        hidden_size=hidden_size,
        mlp_size=a.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=a.integer("max_position_embeddings"),
        score_head=_score_head(a) if reward else None,
        tied_embeddings=a.flag("tie_word_embeddings") and not reward,
        embedding_scale=hidden_size**0.5 if scaled else 1.0,
        query_scale=(a.number("query_pre_attn_scalar") if scaled else head_dim) ** -0.5,
        attention_softcap=caps["attn_logit_softcapping"],
        logits_softcap=caps["final_logit_softcapping"],
        windows=windows,
        **(own | family.traits),
    )
    a.refuse_unread("no such attribute")
    return config


def _score_head(a: Attributes) -> ScoreHead:
    """The head of a reward model, whose only label is the score.

    transformers counts `id2label`, else takes `num_labels`, else two labels.
    """
    names = ("id2label", "label2id", "num_labels")
    for name in [name for name in names if a.get(name) is not None] or ["id2label"]:
        labels = a.get(name)
        if (len(labels) if isinstance(labels, dict) else labels) != 1:
            a.refuse(name, "one label")
    pad_id = a.get("pad_token_id")
    if pad_id is not None and type(pad_id) is not int:
        a.refuse("pad_token_id", "an integer or null")
        pad_id = None
    return ScoreHead(pad_id)


def _heads(a: Attributes) -> tuple[int, int, int]:
    """Query heads, key/value heads and the width of one head."""
    hidden_size, num_heads = a.integer("hidden_size"), a.integer("num_attention_heads")
    num_kv_heads = a.optional_integer("num_key_value_heads") or num_heads
    head_dim = a.optional_integer("head_dim")
    if num_heads % num_kv_heads:
        a.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    if head_dim is None:
        if hidden_size % (2 * num_heads):
            a.refuse("hidden_size", f"an even multiple of num_attention_heads, {num_heads}")
        head_dim = hidden_size // num_heads
    elif head_dim % 2:
        a.refuse("head_dim", "an even number")
    return num_heads, num_kv_heads, max(head_dim, 1)


def _window_rope(a: Attributes) -> float:
    """RoPE's base of the layers with a window; what is left of 5's spelling is as of other models.

    4: `rope_local_base_freq`; 5: by kind of layer, in `rope_parameters`.
    """
    by_kind = a.get("rope_parameters")
    if not isinstance(by_kind, dict) or "sliding_attention" not in by_kind:
        return a.number("rope_local_base_freq")
    local = by_kind["sliding_attention"] or {}
    if not isinstance(local, dict):
        a.refuse("rope_parameters", "an object of objects")
        local = {}
    a.values = a.values | {"rope_parameters": by_kind.get("full_attention")}
    rope = Attributes(local, {"rope_type": "default"}, prefix="rope_parameters.sliding_attention.")
    theta = rope.number("rope_theta")
    rope.fixed("rope_type", ("default",))
    rope.refuse_unread("no such key")
    a.problems |= rope.problems
    return theta


def _rope(a: Attributes) -> tuple[float, RopeScaling | LinearScaling | None]:
    """RoPE's base and scaling, in the spelling of transformers 4 or 5.

    4: `rope_theta` and `rope_scaling` (null or an object); 5: both in `rope_parameters`.
    """
    name = "rope_scaling" if a.get("rope_scaling") else "rope_parameters"
    values = a.get(name) or {}
    if a.get("rope_parameters") not in (None, values):
        a.refuse("rope_parameters", "the same as rope_scaling, where both are given")
    if not isinstance(values, dict):
        a.refuse(name, "an object or null")
        values = {}
    thetas = [v["rope_theta"] for v in (a.values, values) if "rope_theta" in v]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        a.refuse("rope_theta", f"the same as in {name}, where both are given")

    defaults = {
        "rope_type": values.get("type", "default"),
        "rope_theta": a.get("rope_theta"),
        "original_max_position_embeddings": a.get("max_position_embeddings"),
    }
    rope = Attributes(values, defaults, prefix=f"{name}.")
    rope.seen.add("type")
    rope.fixed("partial_rotary_factor", (1.0,))
    theta, rope_type = rope.number("rope_theta"), rope.get("rope_type")
    scaling: RopeScaling | LinearScaling | None = None
    if rope_type == "linear":
        scaling = LinearScaling(rope.number("factor"))
    elif rope_type == "llama3":
        scaling = RopeScaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.integer("original_max_position_embeddings"),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            rope.refuse("high_freq_factor", "more than low_freq_factor")
    elif rope_type != "default":
        name = "rope_type" if "rope_type" in values else "type"
        rope.refuse(name, '"default", "linear" or "llama3"')
        rope.seen |= values.keys()  # the keys of another type are no news
    rope.refuse_unread(f"no such key for rope_type {json.dumps(rope_type)}")
    a.problems |= rope.problems
    return theta, scaling


def _windows(a: Attributes, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window."""
    if "sliding_window" not in family.defaults:
        return (None,) * num_layers
    window = a.optional_integer("sliding_window")
    windowed = family.windowed(a, num_layers)
    if not any(windowed):
        window = None
    if window is None and "rope_local_base_freq" in family.defaults:
        a.refuse("sliding_window", "a positive integer")
    kinds = None if "layer_types" in family.ignored else a.get("layer_types")
    if kinds is not None:
        allowed = ["full_attention"] + ["sliding_attention"] * (window is not None)
        if (
            isinstance(kinds, list)
            and len(kinds) == num_layers
            and all(k in allowed for k in kinds)
        ):
            windowed = [kind == "sliding_attention" for kind in kinds]
        else:
            a.refuse("layer_types", f"{num_layers} times {' or '.join(allowed)}")
    return tuple(window if here else None for here in windowed)
