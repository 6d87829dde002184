"""Numbers of weights, activations and operations of a transformer, from its dimensions.

Counted are decoders of the Llama family: RMS norms, grouped-query attention with rotary positions, a gated MLP
(Touvron et al. 2023, arXiv 2302.13971; Ainslie et al. 2023, arXiv 2305.13245). A model whose layers differ from these
has `ModelShape.total_override`, and its layers count as equal parts of that.
"""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral"})
"""``model_type`` of configs that `ModelShape.layer` counts exactly."""


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder. ``tied``: the output layer is the embedding."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    total_override: int = 0
    """Number of weights of a model whose layers are not counted here; 0 for `FAMILIES`."""
    chunked_logits: bool = True
    """Logits are computed by chunks of tokens (`align.models.heads.TokenLogprobs`)."""

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        if self.total_override:
            return (self.total_override - self.embedding * (1 if self.tied else 2)) // self.num_layers
        biases = self.qkv_bias * (self.query_width + 2 * self.key_width) + self.output_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        norms = 2 * self.hidden + self.qk_norm * 2 * self.head_dim
        return self.layer_matrices + biases + norms

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer that are multiplied with every token."""
        if self.total_override:
            return self.layer
        attention = self.hidden * (self.query_width + 2 * self.key_width) + self.query_width * self.hidden
        return attention + 3 * self.hidden * self.intermediate

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def body(self) -> int:
        """Weights without an output layer."""
        return self.embedding + self.num_layers * self.layer + (0 if self.total_override else self.hidden)

    @property
    def total(self) -> int:
        """Weights of the language model, each once."""
        return self.total_override or self.body + (0 if self.tied else self.embedding)

    @property
    def largest_tensor(self) -> int:
        """Weights of the largest tensor."""
        return max(self.embedding, self.hidden * self.intermediate)

    def scorer(self, num_outputs: int) -> int:
        """Weights of a sequence classifier on this body."""
        return self.body + num_outputs * self.hidden

    def lora(self, rank: int, targets: list[str]) -> int:
        """Weights of adapters of rank r on every layer: r (inputs + outputs) of each target (Hu et al. 2021, arXiv
        2106.09685)."""
        linear = {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.key_width),
            "v_proj": (self.hidden, self.key_width),
            "o_proj": (self.query_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
        parts = {target.rpartition(".")[2] for target in targets}
        sizes = [sum(size) for name, size in linear.items() if "all-linear" in parts or name in parts]
        return rank * self.num_layers * sum(sizes)

    def cache(self, rows: int, positions: int, width: int) -> int:
        """Bytes of a key-value cache: two tensors (rows, kv heads, positions, head size) of ``width`` bytes a number in
        each layer."""
        return 2 * self.num_layers * rows * positions * self.key_width * width

    def forward_flops(self, tokens: float, context: float, predicted: float) -> float:
        """Operations of a forward pass over ``tokens`` that attend to ``context`` keys on average, with the output
        layer on ``predicted`` of them: 2 for each weight and token, 4 for each query, key and head channel (Kaplan et
        al. 2020, arXiv 2001.08361, section 2.1; causal attention at its real cost)."""
        attention = 4 * self.num_layers * self.query_width * tokens * context
        return 2 * self.num_layers * self.layer_matrices * tokens + attention + 2 * self.embedding * predicted
