"""The parameters of decoder models, from the fields of their transformers `config.json`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch


class Weight(NamedTuple):
    """A parameter of a model.

    Attributes:
        name: as in transformers.
        shape: of the whole parameter.
        split: the dimension that tensor parallelism splits; None: every process has all of it.
        dtype: of a parameter that is not trained, and stays as it is; None for one that has the dtype of the plan.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    dtype: torch.dtype | None = None


class Config:
    """The fields of a `config.json`; those that are asked for must be there and be whole numbers."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> int:
        value = self._fields.get(name)
        if value is None:
            raise ValueError(f"config.json lacks {name}, which a model of type {self._fields['model_type']!r} has")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{name} in config.json must be a whole number above 0, got {value!r}")
        return value

    def get(self, name: str, default: Callable[[], int]) -> int:
        """Returns a number that may be absent or null."""
        return self[name] if self._fields.get(name) is not None else default()

    def flag(self, name: str, default: bool) -> bool:
        """Returns whether something is so."""
        return bool(self._fields.get(name, default))


class Family(NamedTuple):
    """Models of one `model_type`.

    Attributes:
        weights: yields the parameters.
        heads: field with the number of heads that tensor parallelism divides.
        otherwise: field that stands for it where that one is absent.
    """

    weights: Callable[[Config], Iterator[Weight]]
    heads: str = "num_key_value_heads"
    otherwise: str = "num_attention_heads"


def _linear(name: str, out: int, into: int, split: int, bias: bool) -> Iterator[Weight]:
    """An `nn.Linear`: split along its outputs (0), and its bias too; or along its inputs (1)."""
    yield Weight(f"{name}.weight", (out, into), split)
    if bias:
        yield Weight(f"{name}.bias", (out,), 0 if split == 0 else None)


class _Llama(NamedTuple):
    """What sets a relative of Llama apart.

    Attributes:
        tied: whether embedding and head are one parameter, if the config does not say.
        qkv_bias: whether queries, keys and values have a bias; None: what `attention_bias` says, of the output too.
        qk_norm: norm of queries and keys: "" for none, "head" for one of the length of a head, "all" for all heads.
        norms: of a layer, besides.
        fused: whether queries, keys and values are one matrix, and the two that go into the gate.
        experts: whether the feed-forward network is a mixture of experts.
    """

    tied: bool = False
    qkv_bias: bool | None = None
    qk_norm: str = ""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    fused: bool = False
    experts: bool = False

    def weights(self, config: Config) -> Iterator[Weight]:
        width, vocabulary = config["hidden_size"], config["vocab_size"]
        yield Weight("model.embed_tokens.weight", (vocabulary, width), 0)
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            yield from self._attention(config, f"{layer}.self_attn", width)
            yield from self._feed_forward(config, f"{layer}.mlp", width)
            for norm in self.norms:
                yield Weight(f"{layer}.{norm}.weight", (width,))
        yield Weight("model.norm.weight", (width,))
        if not config.flag("tie_word_embeddings", self.tied):
            yield Weight("lm_head.weight", (vocabulary, width), 0)

    def _attention(self, config: Config, name: str, width: int) -> Iterator[Weight]:
        heads = config["num_attention_heads"]
        size = config.get("head_dim", lambda: width // heads)
        queries, keys = heads * size, config.get("num_key_value_heads", lambda: heads) * size
        bias = config.flag("attention_bias", False) if self.qkv_bias is None else self.qkv_bias
        rows = {"qkv": queries + 2 * keys} if self.fused else {"q": queries, "k": keys, "v": keys}
        for which, out in rows.items():
            yield from _linear(f"{name}.{which}_proj", out, width, 0, bias)
        yield from _linear(f"{name}.o_proj", width, queries, 1, bias and self.qkv_bias is None)
        for which, length in {"q": queries, "k": keys}.items() if self.qk_norm else ():
            yield Weight(f"{name}.{which}_norm.weight", (size if self.qk_norm == "head" else length,))

    def _feed_forward(self, config: Config, name: str, width: int) -> Iterator[Weight]:
        hidden, bias = config["intermediate_size"], config.flag("mlp_bias", False)
        if self.experts:
            experts = config["num_local_experts"]
            yield Weight(f"{name}.gate.weight", (experts, width))
            yield Weight(f"{name}.experts.gate_up_proj", (experts, 2 * hidden, width), 1)
            yield Weight(f"{name}.experts.down_proj", (experts, width, hidden), 2)
            return
        for which, rows in {"gate_up": 2 * hidden}.items() if self.fused else {"gate": hidden, "up": hidden}.items():
            yield from _linear(f"{name}.{which}_proj", rows, width, 0, bias)
        yield from _linear(f"{name}.down_proj", width, hidden, 1, bias)


def _layer_norm(name: str, width: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (width,))
    yield Weight(f"{name}.bias", (width,))


def _gpt2(config: Config) -> Iterator[Weight]:
    """Its matrices are the transposes of those of an `nn.Linear`."""
    width, vocabulary = config["n_embd"], config["vocab_size"]
    hidden = config.get("n_inner", lambda: 4 * width)
    yield Weight("transformer.wte.weight", (vocabulary, width), 0)
    yield Weight("transformer.wpe.weight", (config["n_positions"], width))
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        yield from _layer_norm(f"{layer}.ln_1", width)
        yield from _layer_norm(f"{layer}.ln_2", width)
        columns = {"attn.c_attn": (width, 3 * width), "mlp.c_fc": (width, hidden)}
        for name, shape in columns.items():
            yield Weight(f"{layer}.{name}.weight", shape, 1)
            yield Weight(f"{layer}.{name}.bias", shape[1:], 0)
        for name, into in {"attn.c_proj": width, "mlp.c_proj": hidden}.items():
            yield Weight(f"{layer}.{name}.weight", (into, width), 0)
            yield Weight(f"{layer}.{name}.bias", (width,))
    yield from _layer_norm("transformer.ln_f", width)
    if not config.flag("tie_word_embeddings", True):
        yield Weight("lm_head.weight", (vocabulary, width), 0)


def _gpt_neox(config: Config) -> Iterator[Weight]:
    width, hidden, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    bias = config.flag("attention_bias", True)
    yield Weight("gpt_neox.embed_in.weight", (vocabulary, width), 0)
    for i in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        yield from _layer_norm(f"{layer}.input_layernorm", width)
        yield from _layer_norm(f"{layer}.post_attention_layernorm", width)
        yield from _linear(f"{layer}.attention.query_key_value", 3 * width, width, 0, bias)
        yield from _linear(f"{layer}.attention.dense", width, width, 1, bias)
        yield from _linear(f"{layer}.mlp.dense_h_to_4h", hidden, width, 0, True)
        yield from _linear(f"{layer}.mlp.dense_4h_to_h", width, hidden, 1, True)
    yield from _layer_norm("gpt_neox.final_layer_norm", width)
    if not config.flag("tie_word_embeddings", False):
        yield Weight("lm_head.weight", (vocabulary, width), 0)


_AROUND = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

FAMILIES = {
    "gemma": Family(_Llama(tied=True).weights),
    "gemma2": Family(_Llama(tied=True, norms=(*_Llama().norms, *_AROUND)).weights),
    "gemma3_text": Family(_Llama(tied=True, qk_norm="head", norms=(*_Llama().norms, *_AROUND)).weights),
    "gpt2": Family(_gpt2, "n_head", "n_head"),
    "gpt_neox": Family(_gpt_neox, "num_attention_heads"),
    "granite": Family(_Llama().weights),
    "llama": Family(_Llama().weights),
    "mistral": Family(_Llama(qkv_bias=False).weights),
    "mixtral": Family(_Llama(qkv_bias=False, experts=True).weights),
    "olmo2": Family(_Llama(qk_norm="all", norms=("post_attention_layernorm", "post_feedforward_layernorm")).weights),
    "phi3": Family(_Llama(qkv_bias=False, fused=True).weights),
    "qwen2": Family(_Llama(qkv_bias=True).weights),
    "qwen3": Family(_Llama(qk_norm="head").weights),
}
"""By the `model_type` of their config."""
