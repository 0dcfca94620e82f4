"""config.json -> DecoderConfig. Every attribute is understood, or the model is refused.

An attribute is handled here, listed as harmless, or must have the one value that this
decoder implements. Missing attributes have the defaults of transformers' config classes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig, RopeScaling, ScoreHead

# Bookkeeping, training and generation: no effect on the logits of a given weight and text.
# fmt: off
HARMLESS = frozenset({
    "_attn_implementation", "_commit_hash", "_name_or_path", "attention_dropout",
    "attn_implementation", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "do_sample", "dtype", "early_stopping", "eos_token_id", "finetuning_task", "id2label",
    "initializer_range", "label2id", "length_penalty", "max_length", "max_new_tokens",
    "min_length", "no_repeat_ngram_size", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "task_specific_params", "temperature", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
})
# fmt: on

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


@dataclasses.dataclass(frozen=True)
class _Family:
    """What an architecture's name implies."""

    name: Literal["qwen2", "llama", "gemma2"]
    defaults: dict[str, Any]  # of transformers' config class
    fixed: dict[str, tuple[Any, ...]]
    ignored: frozenset[str] = frozenset()  # attributes that published configs carry to no effect


_FAMILIES = {
    "Qwen2ForCausalLM": _Family(
        "qwen2",
        defaults={
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
        },
        fixed={"hidden_act": ("silu",)},
    ),
    "LlamaForCausalLM": _Family(
        "llama",
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
        },
        fixed={"hidden_act": ("silu",), "sliding_window": (None,)},
    ),
    "Gemma2ForCausalLM": _Family(
        "gemma2",
        defaults={
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fixed=dict.fromkeys(["hidden_activation", "hidden_act"], ("gelu_pytorch_tanh",)),
        ignored=frozenset({"sliding_window_size"}),
    ),
}
_REWARD_FAMILIES = {"LlamaForSequenceClassification": _FAMILIES["LlamaForCausalLM"]}


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
            self.refuse(name, supported)


def read_config(directory: Path, *, reward: bool = False) -> DecoderConfig:
    """The decoder that `directory/config.json` describes: with `reward`, one with a score head.

    Raises GradjaxError where the file is missing or malformed, the architecture is not one
    of Qwen2ForCausalLM, LlamaForCausalLM and Gemma2ForCausalLM (with `reward`, not
    LlamaForSequenceClassification), or an attribute is unknown or has a value that this decoder
    does not implement; all such attributes are named.
    """
    path = Path(directory) / "config.json"
    values = read_json_object(path)
    family = _family(path, values, reward)
    attributes = Attributes(values, _SHARED_DEFAULTS | family.defaults)
    config = _decoder_config(attributes, family, reward)
    if attributes.problems:
        raise GradjaxError(
            f"{path}: this decoder does not implement what the config asks for: "
            f"{'; '.join(attributes.problems.values())}: use a checkpoint with supported values."
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
                f"{', '.join(families)}: use a Qwen2.5, Llama 3 or Gemma 2 checkpoint."
            )
    if values.get("model_type", family.name) != family.name:
        raise GradjaxError(
            f"{path}: model_type is {json.dumps(values['model_type'])} but architectures is "
            f"{json.dumps(architectures)}, which is {family.name}: correct the one that is wrong."
        )
    return family


def _decoder_config(a: Attributes, family: _Family, reward: bool) -> DecoderConfig:
    a.seen |= HARMLESS | family.ignored | {"architectures", "model_type"}
    for name, allowed in (FIXED | family.fixed).items():
        a.fixed(name, allowed)
    num_layers = a.integer("num_hidden_layers")
    num_heads, num_kv_heads, head_dim = _heads(a)
    rope_theta, rope_scaling = _rope(a)
    gemma = family.name == "gemma2"
    config = DecoderConfig(
        family=family.name,
        vocab_size=a.integer("vocab_size"),
        hidden_size=a.integer("hidden_size"),
        mlp_size=a.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=a.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_positions=a.integer("max_position_embeddings"),
        score_head=_score_head(a) if reward else None,
        tied_embeddings=a.flag("tie_word_embeddings") and not reward,
        qkv_bias=family.name == "qwen2",
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        embedding_scale=a.integer("hidden_size") ** 0.5 if gemma else 1.0,
        query_scale=(a.number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        activation="gelu_tanh" if gemma else "silu",
        attention_softcap=a.optional_number("attn_logit_softcapping") if gemma else None,
        logits_softcap=a.optional_number("final_logit_softcapping") if gemma else None,
        windows=_windows(a, family, num_layers),
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


def _rope(a: Attributes) -> tuple[float, RopeScaling | None]:
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
    theta, rope_type, scaling = rope.number("rope_theta"), rope.get("rope_type"), None
    if rope_type == "llama3":
        scaling = RopeScaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.integer("original_max_position_embeddings"),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            rope.refuse("high_freq_factor", "more than low_freq_factor")
    elif rope_type != "default":
        rope.refuse("rope_type" if "rope_type" in values else "type", '"default" or "llama3"')
        rope.seen |= values.keys()  # the keys of another type are no news
    rope.refuse_unread(f"no such key for rope_type {json.dumps(rope_type)}")
    a.problems |= rope.problems
    return theta, scaling


def _windows(a: Attributes, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window."""
    window = a.optional_integer("sliding_window")
    if family.name == "qwen2":
        first = a.get("max_window_layers")
        if type(first) is not int or first < 0:
            a.refuse("max_window_layers", "an integer from 0")
            first = 0
        windowed = [layer >= first for layer in range(num_layers)]
        if not a.flag("use_sliding_window"):
            window = None
    else:
        windowed = [family.name == "gemma2" and layer % 2 == 0 for layer in range(num_layers)]
    if (kinds := a.get("layer_types")) is not None:
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
