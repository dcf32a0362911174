"""T-JEPA in one sitting: the whole method in one file, to be read from top to bottom.

A context encoder reads the visible bytes of a text. A predictor guesses, for every hidden position, what the target
encoder says there, which reads the whole text. The target encoder is a moving average of the context encoder. By
default this trains fifty steps on this file itself:

    python docs/minimal.py --file my.txt --steps 50

One document at a time and no padding: `tjepa` packs many documents into a row and computes the same loss.
"""

import argparse
import copy
import random
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


# ---- what is hidden ----


def draw_blocks(num_tokens: int, block_length: int, ratio: float, rng: random.Random) -> torch.Tensor:
    """For every token 0 where it is visible, and 1, 2, ... where it belongs to the first, second, ... target block."""
    lengths, budget = [], max(1, int(ratio * num_tokens))
    while budget > 0:
        lengths.append(min(block_length, budget))
        budget -= lengths[-1]
    pieces = [[0]] * (num_tokens - sum(lengths)) + [[block] * length for block, length in enumerate(lengths, start=1)]
    rng.shuffle(pieces)  # whole blocks among single visible tokens: every place is as likely, and none overlap
    return torch.tensor([block for piece in pieces for block in piece])


# ---- a transformer whose positions are given, not counted ----


def rotate(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (RoFormer) of states [heads, n, head_dim] at positions [n]; features 2i, 2i + 1 are a pair."""
    head_dim = states.shape[-1]
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)  # [n, head_dim / 2]
    even, odd = states[..., 0::2], states[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, states: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        query, key, value = self.qkv_proj(states).unflatten(-1, (3, self.num_heads, -1)).permute(1, 2, 0, 3)
        query, key = rotate(query, positions), rotate(key, positions)  # [heads, n, head_dim]
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=allowed)[0]
        return self.out_proj(mixed.transpose(0, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, num_heads)
        up_proj, down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(up_proj=up_proj, gelu=nn.GELU(), down_proj=down_proj))

    def forward(self, states: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        states = states + self.attention(self.attention_norm(states), positions, allowed)
        return states + self.mlp(self.mlp_norm(states))


class Encoder(nn.Module):
    def __init__(self, vocab_size: int, width: int, num_layers: int, num_heads: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, num_heads) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """tokens and their positions in the document, both [n] -> states [n, width]."""
        states = self.token_embedding(tokens)
        for layer in self.layers:
            states = layer(states, positions, allowed=None)
        return self.final_norm(states)


class Predictor(nn.Module):
    def __init__(self, width: int, num_layers: int, num_heads: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleList(Layer(width, num_heads) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(width)

    def forward(self, context: torch.Tensor, positions: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """context [visible, width]; positions and blocks [visible + hidden] -> predictions [hidden, width]."""
        states = torch.cat([context, self.mask_token.expand(len(positions) - len(context), -1)])
        # everyone sees the context and its own block
        allowed = (blocks[None] == 0) | (blocks[None] == blocks[:, None])
        for layer in self.layers:
            states = layer(states, positions, allowed)
        return self.final_norm(states)[len(context) :]


# ---- the loss, and a training loop around it ----


def jepa_loss(context_encoder, target_encoder, predictor, documents, blocks_of_documents) -> torch.Tensor:
    """Smooth L1 between predictions and layer-normalised target states, mean over hidden positions and features."""
    predictions, labels = [], []
    for tokens, blocks in zip(documents, blocks_of_documents, strict=True):
        order = blocks.argsort(stable=True)  # the visible tokens, then block after block
        visible, hidden = order[blocks[order] == 0], order[blocks[order] > 0]
        with torch.no_grad():
            states = target_encoder(tokens, torch.arange(len(tokens)))[hidden]
        labels.append(F.layer_norm(states, states.shape[-1:]))
        predictions.append(predictor(context_encoder(tokens[visible], visible), order, blocks[order]))
    return F.smooth_l1_loss(torch.cat(predictions), torch.cat(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=Path(__file__), help="the text to train on (default: this file)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: 50)")
    args = parser.parse_args()
    text, rng = torch.tensor(list(args.file.read_bytes())), random.Random(0)

    torch.manual_seed(0)
    context_encoder, predictor = Encoder(256, width=64, num_layers=2, num_heads=2), Predictor(64, 2, num_heads=2)
    target_encoder = copy.deepcopy(context_encoder)
    optimizer = torch.optim.AdamW([*context_encoder.parameters(), *predictor.parameters()], lr=1e-3)
    for step in range(args.steps):
        documents = [text[rng.randrange(max(1, len(text) - 128)) :][:128] for _ in range(8)]
        blocks = [draw_blocks(len(document), block_length=8, ratio=0.25, rng=rng) for document in documents]
        loss = jepa_loss(context_encoder, target_encoder, predictor, documents, blocks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum = 0.996 + 0.004 * step / args.steps
        for target, context in zip(target_encoder.parameters(), context_encoder.parameters(), strict=True):
            target.data.lerp_(context.data, 1 - momentum)
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:3}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
