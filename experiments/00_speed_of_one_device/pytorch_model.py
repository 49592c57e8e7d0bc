"""A decoder of nanoGPT's shape in plain PyTorch: the other side of the speed comparison.

Written from the hyper-parameters of nanoGPT's CPU recipe (github.com/karpathy/nanoGPT): pre-norm
blocks, LayerNorm without bias, learned positions, GELU MLP of 4 D, tied embedding, AdamW (0.9, 0.99,
decay 0.1 on matrices), clipping at 1, `F.scaled_dot_product_attention`.

    python pytorch_model.py --length=256 --batch=12 [--compile]     # a worker, see worker.py

B batch  T tokens  N heads  D model  V vocab
"""

import argparse

import torch
import worker
from torch import nn
from torch.nn import functional


class Block(nn.Module):

  def __init__(self, dim: int, heads: int):
    super().__init__()
    self.heads = heads
    self.norm_1, self.norm_2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
    self.qkv = nn.Linear(dim, 3 * dim, bias=False)
    self.out = nn.Linear(dim, dim, bias=False)
    self.up = nn.Linear(dim, 4 * dim, bias=False)
    self.down = nn.Linear(4 * dim, dim, bias=False)

  def forward(self, x):
    B, T, D = x.shape
    q, k, v = (y.view(B, T, self.heads, D // self.heads).transpose(1, 2)
               for y in self.qkv(self.norm_1(x)).split(D, dim=2))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
    return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Model(nn.Module):

  def __init__(self, vocab: int, length: int, layers: int, heads: int, dim: int):
    super().__init__()
    self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
    self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
    self.norm = nn.LayerNorm(dim, bias=False)
    self.head = nn.Linear(dim, vocab, bias=False)
    self.head.weight = self.tokens.weight
    for p in self.parameters():
      if p.dim() > 1:
        nn.init.normal_(p, std=0.02)

  def forward(self, tokens_BT, targets_BT):
    x = self.tokens(tokens_BT) + self.positions.weight[:tokens_BT.shape[1]]
    for block in self.blocks:
      x = block(x)
    logits = self.head(self.norm(x))
    return functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  worker.add_arguments(parser)
  parser.add_argument('--compile', action='store_true', help='torch.compile the model')
  args = parser.parse_args()
  torch.manual_seed(0)
  model = Model(args.vocab, args.length, args.layers, args.heads, args.dim)
  groups = [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=0.1),
            dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)]
  optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
  forward = torch.compile(model) if args.compile else model
  tokens, targets = (torch.from_numpy(x).long() for x in worker.batch(args))

  def step() -> float:
    loss = forward(tokens, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  worker.serve(step, sum(p.numel() for p in model.parameters()))


if __name__ == '__main__':
  main()
