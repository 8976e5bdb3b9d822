"""PyTorch's own multi-head attention, once heads of it are gone or its stream is narrower.

`nn.MultiheadAttention` computes the width of a head from that of the stream, so no forward of it can follow a cut. Its
module keeps its parameters and names, and becomes an instance of this subclass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadwiseAttention(nn.MultiheadAttention):
    """Attention whose heads and stream have their own widths: in_proj [3·heads·width, in], out_proj [out, heads·width].

    Masks of keys are not taken: vision networks give none.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in `nn.MultiheadAttention`; query, key and value are [N, T, C], or [T, N, C] without batch_first.

        Raises:
            NotImplementedError: a key_padding_mask was given.
        """
        if key_padding_mask is not None:
            raise NotImplementedError(
                "a pruned attention takes no key_padding_mask; leave it out, or exclude the layer"
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # True is left out here, and read in PyTorch's product.
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, -torch.inf)
        q, k, v = (part.transpose(-3, -2) for part in self._projected(query, key, value))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = torch.softmax(scores if attn_mask is None else scores + attn_mask, -1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [N, T, heads, width]."""
        if query is key and key is value:  # one product, which can be traced and cut again
            x = query if self.batch_first else query.transpose(0, 1)
            packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
            return packed.reshape(*packed.shape[:-1], 3, -1, self.head_dim).unbind(-3)
        batched = (query, key, value) if self.batch_first else (part.transpose(0, 1) for part in (query, key, value))
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = (F.linear(*each) for each in zip(batched, self.in_proj_weight.chunk(3), biases, strict=True))
        return tuple(part.reshape(*part.shape[:-1], -1, self.head_dim) for part in parts)


FOLLOWING = (nn.MultiheadAttention, HeadwiseAttention)


def follow_cut(model: nn.Module) -> None:
    """Let every multi-head attention in `model` whose parameters were cut compute with what is left. Works in place."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and type(module) in FOLLOWING and module._qkv_same_embed_dim:
            weight: Tensor = module.in_proj_weight
            heads, stream = weight.shape[0] // (3 * module.head_dim), weight.shape[1]
            if (heads, stream) != (module.num_heads, module.embed_dim):
                module.__class__ = HeadwiseAttention
                module.num_heads, module.embed_dim = heads, stream
                module.kdim, module.vdim = stream, stream
    for module in model.modules():
        # Its fast path takes the width of a head from that of the stream; this flag leads around it.
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.self_attn, HeadwiseAttention):
            module.activation_relu_or_gelu = 0
