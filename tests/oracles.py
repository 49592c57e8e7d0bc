"""The definitions, in NumPy float64 and loops. Imports nothing of longctx.

Each function is written from its paper's equation, as plainly as possible; the fast versions are
held to it.
"""

import numpy as np

# --- Evaluation and sampling -----------------------------------------------------------------


def count_model_nll(tokens, targets, vocab_size):
  """Nats of each target under Laplace's rule after tokens[0..t]: (1 + count) / (V + t + 1)."""
  counts = np.zeros(vocab_size)
  nll = np.zeros(len(tokens))
  for t in range(len(tokens)):
    counts[tokens[t]] += 1
    nll[t] = -np.log((1 + counts[targets[t]]) / (vocab_size + t + 1))
  return nll


def windowed_scores(documents, length, stride, nll_of):
  """(document, target index, position, nats) of every target, in windows, each scored once.

  `nll_of(tokens, targets)` gives the nats of one window read from an empty state.
  """
  rows = []
  for d, document in enumerate(documents):
    targets = list(document[1:]) + [document[0]]
    done, start = 0, 0
    while done < len(document):
      stop = min(start + length, len(document))
      nll = nll_of(document[start:stop], targets[start:stop])
      for i in range(done, stop):
        rows.append((d, i, i - start, nll[i - start]))
      done, start = stop, start + stride
  return rows


def kept_tokens(logits, temperature, top_k, top_p, min_p):
  """(set of token ids that may be drawn, their probabilities over all V), one row, by loops."""
  x = np.asarray(logits, np.float64) / temperature
  vocab = len(x)
  kept = set(range(vocab))

  def probabilities():
    top = max(x[i] for i in kept)
    weight = [np.exp(x[i] - top) if i in kept else 0.0 for i in range(vocab)]
    return [w / sum(weight) for w in weight]

  if top_k and top_k < vocab:
    kth = sorted(x, reverse=True)[top_k - 1]
    kept = {i for i in kept if x[i] >= kth}
  if top_p < 1:
    p = probabilities()
    ranked = sorted(kept, key=lambda i: (-p[i], i))
    kept, mass = set(), 0.0
    for i in ranked:
      kept.add(i)
      mass += p[i]
      if mass >= top_p:
        break
  if min_p:
    p = probabilities()
    kept = {i for i in kept if p[i] >= min_p * max(p)}
  return kept, np.array(probabilities())


# --- Data: which pairs stand where -----------------------------------------------------------


def document_pairs(document, separator):
  """[(input, target)] of one document: SEP b1 .. bn and b1 .. bn SEP."""
  inputs = [separator]
  for b in document:
    inputs.append(b)
  targets = inputs[1:] + [separator]
  return [(inputs[i], targets[i]) for i in range(len(inputs))]


def chopped_rows(documents, length, separator):
  """Rows of (token, target, position, segment, start); `documents` in the order of the line."""
  line = [(d, pair) for d, document in enumerate(documents)
          for pair in document_pairs(document, separator)]
  rows = []
  for low in range(0, len(line) - length + 1, length):
    row, segment, position = [], 0, 0
    for t in range(length):
      d, (token, target) = line[low + t]
      start = t == 0 or line[low + t - 1][0] != d
      if start:
        segment, position = segment + 1, 0
      row.append((token, target, position, segment, start))
      position += 1
    rows.append(row)
  return rows


def lane_batches(documents, length, batch_size, separator):
  """Batches of one epoch: [batch][lane] rows of (token, target, position, document, start)."""
  line = [(d, pair) for d, document in enumerate(documents)
          for pair in document_pairs(document, separator)]
  num_batches = 0
  while (num_batches + 1) * length * batch_size <= len(line):
    num_batches += 1
  batches = [[[] for _ in range(batch_size)] for _ in range(num_batches)]
  for lane in range(batch_size):
    position, before = 0, None
    for k in range(num_batches * length):
      d, (token, target) = line[lane * num_batches * length + k]
      start = d != before
      position = 0 if start else position + 1
      batches[k // length][lane].append((token, target, position, d, start))
      before = d
  return batches


def best_fit_fills(lengths, capacity):
  """How full each row gets when each item goes to the fullest row that still takes it."""
  fills = []
  for n in lengths:
    best = None
    for r in range(len(fills)):
      if fills[r] + n <= capacity and (best is None or fills[r] > fills[best]):
        best = r
    if best is None:
      fills.append(n)
    else:
      fills[best] += n
  return sorted(fills)


# ---- Loss (longctx/training/loss.py) ----


def cross_entropy(hidden, embedding, targets, weights, z_loss=0.0, label_smoothing=0.0):
  """(total, nll [B, T], d total/d hidden, d total/d embedding), token by token in float64.

  loss = -sum_v q_v log p_v + z (log sum_v e^l_v)^2 with q = (1 - s) onehot + s / V, times its weight.
  """
  hidden, embedding = np.float64(hidden), np.float64(embedding)
  (B, T, _), V = hidden.shape, embedding.shape[0]
  total, nll = 0.0, np.zeros((B, T))
  dhidden, dembedding = np.zeros_like(hidden), np.zeros_like(embedding)
  for b in range(B):
    for t in range(T):
      logits = np.array([embedding[v] @ hidden[b, t] for v in range(V)])
      lse = logits.max() + np.log(np.sum(np.exp(logits - logits.max())))
      log_p = logits - lse
      q = np.full(V, label_smoothing / V)
      q[targets[b, t]] += 1 - label_smoothing
      nll[b, t] = -log_p[targets[b, t]]
      total += weights[b, t] * (-(q * log_p).sum() + z_loss * lse**2)
      dlogits = weights[b, t] * (np.exp(log_p) - q + 2 * z_loss * lse * np.exp(log_p))
      for v in range(V):
        dhidden[b, t] += dlogits[v] * embedding[v]
        dembedding[v] += dlogits[v] * hidden[b, t]
  return total, nll, dhidden, dembedding


# ---- Optimisers and schedules (longctx/training/optim.py) ----


def schedule(name, step, num_steps, peak, warmup, final_fraction, decay_fraction, stairs=None):
  """Learning rate of update number `step` (from 0)."""
  if step < warmup:
    return peak * (step + 1) / (warmup + 1)
  done = min(1.0, (step - warmup) / (num_steps - warmup))
  final = final_fraction * peak
  if name == 'constant':
    return peak
  if name == 'linear':
    return peak + done * (final - peak)
  if name == 'cosine':
    return final + (peak - final) * (1 + np.cos(np.pi * done)) / 2
  if name == 'staircase':
    start, every, factor = stairs
    rate = peak
    for s in range(warmup + 1, step + 1):   # after so many updates
      if s - warmup > start and (s - warmup - start) % every == 0:
        rate *= factor
    return rate
  decay = round(decay_fraction * num_steps)   # wsd
  return peak + max(0.0, min(1.0, (step - (num_steps - decay)) / decay)) * (final - peak)


def optimizer(name, params, grads, rates, decaying, *, weight_decay, beta1, beta2, epsilon,
              momentum, clip_norm):
  """Parameters (a dict of arrays) after one update for each of `grads` (a list of such dicts)."""
  params = {k: np.float64(x) for k, x in params.items()}
  m = {k: np.zeros_like(x) for k, x in params.items()}
  v = {k: np.zeros_like(x) for k, x in params.items()}
  for t, (grad, rate) in enumerate(zip(grads, rates), 1):
    grad = {k: np.float64(g) for k, g in grad.items()}
    norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
    if clip_norm and norm > clip_norm:
      grad = {k: g * clip_norm / norm for k, g in grad.items()}
    for k, g in grad.items():
      if name == 'adamw':
        m[k] = beta1 * m[k] + (1 - beta1) * g
        v[k] = beta2 * v[k] + (1 - beta2) * g**2
        direction = (m[k] / (1 - beta1**t)) / (np.sqrt(v[k] / (1 - beta2**t)) + epsilon)
      elif name == 'lion':
        direction = np.sign(beta1 * m[k] + (1 - beta1) * g)
        m[k] = beta2 * m[k] + (1 - beta2) * g
      elif name == 'sgd':
        m[k] = g + momentum * m[k]
        direction = m[k]
      else:   # adafactor, whose second moment is whole for matrices this small
        decay = 1 - t**-0.8
        v[k] = decay * v[k] + (1 - decay) * (g**2 + 1e-30)
        direction = g / np.sqrt(v[k])
        direction = direction / max(1.0, np.sqrt(np.mean(direction**2)))
      decayed = weight_decay * params[k] if k in decaying else 0.0
      params[k] = params[k] - rate * (direction + decayed)
  return params


def newton_schulz(matrix):
  """Muon's five quintic iterations towards the orthogonal factor of a matrix."""
  x = np.float64(matrix) / np.linalg.norm(matrix)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


# --- Attention -------------------------------------------------------------------------------


def interval_mask(start, end, k_index):
  """[B, T, S] bool: start[b, t] <= k_index[b, s] < end[b, t]."""
  start, end, k_index = (np.asarray(x) for x in (start, end, k_index))   # an index of a jax.Array takes 0.1 ms
  sees = np.zeros((*start.shape, k_index.shape[1]), bool)
  for b, t, s in np.ndindex(*sees.shape):
    sees[b, t, s] = start[b, t] <= k_index[b, s] < end[b, t]
  return sees


def attention(q, k, v, start, end, k_index, scale):
  """(out [B, T, N, H], lse [B, T, N]): softmax over the keys seen; none seen: 0 and -inf."""
  return masked_attention(q, k, v, interval_mask(start, end, k_index), scale)


def attention_gradients(q, k, v, start, end, k_index, scale, dout, dlse):
  """Gradients in q, k, v of sum(out * dout) + sum(lse * dlse), by the softmax's Jacobian."""
  return masked_gradients(q, k, v, interval_mask(start, end, k_index), scale, dout, dlse)[:3]


def _row(q, k, sees, scale, softcap, bias, sink, b, t, n):
  """Of one query and head: keys seen, d score / d q.k, probabilities of the keys, lse."""
  head = n // (q.shape[2] // k.shape[2])
  keys = np.flatnonzero(sees[b, t])
  scores = np.array([scale * np.dot(q[b, t, n], k[b, s, head]) for s in keys])
  slope = np.full(len(keys), scale)
  if softcap:
    slope = scale * (1 - np.tanh(scores / softcap) ** 2)
    scores = softcap * np.tanh(scores / softcap)
  if bias is not None:
    scores = scores + bias[n, t, keys]
  terms = scores if sink is None else np.append(scores, sink[n])
  if len(terms) == 0:
    return keys, slope, scores, -np.inf
  lse = terms.max() + np.log(np.exp(terms - terms.max()).sum())
  return keys, slope, np.exp(scores - lse), lse


def masked_attention(q, k, v, sees, scale, softcap=0.0, bias=None, sink=None):
  """(out, lse) of scores c tanh(scale q.k / c) + bias[n, t, s]; sink[n] is one more logit."""
  out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
  for b, t, n in np.ndindex(*q.shape[:3]):
    keys, _, p, lse[b, t, n] = _row(q, k, sees, scale, softcap, bias, sink, b, t, n)
    for s, weight in zip(keys, p):
      out[b, t, n] += weight * v[b, s, n // (q.shape[2] // k.shape[2])]
  return out, lse


def masked_gradients(q, k, v, sees, scale, dout, dlse, softcap=0.0, bias=None, sink=None):
  """(dq, dk, dv, dbias, dsink) of sum(out * dout) + sum(lse * dlse), by the softmax's Jacobian."""
  dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
  dbias = np.zeros((q.shape[2], q.shape[1], k.shape[1]))
  dsink = np.zeros(q.shape[2])
  for b, t, n in np.ndindex(*q.shape[:3]):
    head = n // (q.shape[2] // k.shape[2])
    keys, slope, p, lse = _row(q, k, sees, scale, softcap, bias, sink, b, t, n)
    if lse == -np.inf:
      continue
    every = p if sink is None else np.append(p, np.exp(sink[n] - lse))
    dp = np.array([np.dot(dout[b, t, n], v[b, s, head]) for s in keys]
                  + ([] if sink is None else [0.0]))
    jacobian = np.diag(every) - np.outer(every, every)                # d p / d scores
    dscores = jacobian @ dp + dlse[b, t, n] * every                   # d lse / d scores = p
    if sink is not None:
      dsink[n] += dscores[-1]
    for i, s in enumerate(keys):
      dq[b, t, n] += slope[i] * dscores[i] * k[b, s, head]
      dk[b, s, head] += slope[i] * dscores[i] * q[b, t, n]
      dv[b, s, head] += p[i] * dout[b, t, n]
      dbias[n, t, s] += dscores[i]
  return dq, dk, dv, dbias, dsink


# Models. Written from the papers named in longctx/models and longctx/recurrence.


def lstm_cell(x, w_in, w_hidden, bias, h, c):
  """One step: x [I], w_in [I, 4, E], w_hidden [E, 4, E], bias [4, E]; gates i, f, g, o."""
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  i, f, g, o = (x @ w_in[:, n] + h @ w_hidden[:, n] + bias[n] for n in range(4))
  c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
  return sigmoid(o) * np.tanh(c), c


def rms_norm(x, scale, epsilon):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rope(x, positions, base):
  """x [T, H]: pair (j, j + H/2) turned by position * base^(-2j/H), one number at a time."""
  length, width = x.shape
  y = np.empty_like(x)
  for t in range(length):
    for j in range(width // 2):
      angle = positions[t] * base ** (-2 * j / width)
      a, b = x[t, j], x[t, j + width // 2]
      y[t, j] = a * np.cos(angle) - b * np.sin(angle)
      y[t, j + width // 2] = b * np.cos(angle) + a * np.sin(angle)
  return y


def segment_attention(x, p, *, segment, short_term, base, epsilon):
  """A layer over one row x [T, D]; a token hears its segment and `short_term` tokens before it.

  Returns (q, k, v) of the normed tokens as they are, (q, k) turned by their positions, and what the
  heads hear, [T, N, H].
  """
  hidden, place = rms_norm(x, p['norm'], epsilon), np.arange(len(x))
  q, k, v = (np.einsum('td,dnh->tnh', hidden, w) for w in (p['w_q'], p['w_k'], p['w_v']))
  turn = lambda y: np.stack([rope(y[:, n], place, base) for n in range(y.shape[1])], axis=1)
  first = place // segment * segment - short_term
  sees = (place >= first[:, None]) & (place <= place[:, None])
  near, _ = masked_attention(turn(q)[None], turn(k)[None], v[None], sees[None], q.shape[-1] ** -0.5)
  return (q, k, v), (turn(q), turn(k)), near[0]


def decoder_block(x, p, *, num_heads, num_kv_heads, positions, base, epsilon, window):
  """One pre-norm block over one document, x [T, D], in loops over heads and queries."""
  silu = lambda z: z / (1 + np.exp(-z))
  h = rms_norm(x, p['attention_norm'], epsilon)
  q = np.einsum('td,dnh->nth', h, p['w_q'])
  k = np.einsum('td,dkh->kth', h, p['w_kv'][:, 0])
  v = np.einsum('td,dkh->kth', h, p['w_kv'][:, 1])
  out = np.zeros_like(x)
  for n in range(num_heads):
    group = n // (num_heads // num_kv_heads)
    queries, keys = rope(q[n], positions, base), rope(k[group], positions, base)
    for t in range(len(x)):
      first = max(0, t - window + 1) if window else 0
      scores = keys[first:t + 1] @ queries[t] / np.sqrt(q.shape[-1])
      weights = np.exp(scores - scores.max())
      out[t] += (weights / weights.sum()) @ v[group][first:t + 1] @ p['w_attention_out'][n]
  x = x + out
  h = rms_norm(x, p['mlp_norm'], epsilon)
  return x + (silu(h @ p['w_in'][:, 0]) * (h @ p['w_in'][:, 1])) @ p['w_out']


def sinusoid(length, width):
  """Vaswani et al. 2017, section 3.5: [T, D]."""
  table = np.empty((length, width))
  for p in range(length):
    for i in range(width // 2):
      table[p, 2 * i] = np.sin(p / 10_000 ** (2 * i / width))
      table[p, 2 * i + 1] = np.cos(p / 10_000 ** (2 * i / width))
  return table


def heads_of(x, given, p, sees, base=None, epsilon=1e-6):
  """Attention of x [T, D] to `given` [S, D] by loops; rotary positions with `base`. `p`: w_q, w_kv, w_out."""
  q = np.einsum('td,dnh->nth', x, p['w_q'])
  k, v = (np.einsum('sd,dkh->ksh', given, p['w_kv'][:, i]) for i in range(2))
  if 'q_norm' in p:
    q, k = rms_norm(q, p['q_norm']['scale'], epsilon), rms_norm(k, p['k_norm']['scale'], epsilon)
  out = np.zeros_like(x)
  for n in range(len(q)):
    group = n // (len(q) // len(k))
    queries, keys = q[n], k[group]
    if base:
      queries, keys = rope(queries, range(len(x)), base), rope(keys, range(len(given)), base)
    for t in range(len(x)):
      which = [s for s in range(len(given)) if sees(t, s)]
      if which:
        scores = keys[which] @ queries[t] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[t] += (weights / weights.sum()) @ v[group][which] @ p['w_out'][n]
  return out


def encoder_decoder(p, source, target, *, position, base=1e4, epsilon=1e-6):
  """Hidden states of the target; `p`: nested dicts of float64. Tokens are lists, without padding."""
  silu = lambda z: z / (1 + np.exp(-z))
  norm = lambda x, of: rms_norm(x, of['scale'], epsilon)
  turned = base if position == 'rope' else None
  def mlp(x, of):
    return (silu(x @ of['w_in'][:, 0]) * (x @ of['w_in'][:, 1])) @ of['w_out']
  def embedded(tokens, table):
    x = p['embedding']['table'][tokens]
    if position == 'sinusoidal':
      return x * np.sqrt(x.shape[1]) + sinusoid(len(tokens), x.shape[1])
    return x + table[:len(tokens)] if position == 'learned' else x

  x = embedded(source, p['encoder'].get('positions', {}).get('table'))
  for layer in p['encoder']['blocks']:
    h = norm(x, layer['mixer_norm'])
    x = x + heads_of(h, h, layer['mixer'], lambda t, s: True, turned, epsilon)
    x = x + mlp(norm(x, layer['mlp_norm']), layer['mlp'])
  encoded = norm(x, p['encoder']['norm'])
  y = embedded(target, p.get('positions', {}).get('table'))
  for layer in p['blocks']:
    h = norm(y, layer['mixer_norm'])
    y = y + heads_of(h, h, layer['mixer'], lambda t, s: s <= t, turned, epsilon)
    y = y + heads_of(norm(y, layer['source_norm']), encoded, layer['source'], lambda t, s: True,
                     None, epsilon)
    y = y + mlp(norm(y, layer['mlp_norm']), layer['mlp'])
  return norm(y, p['norm'])


# Recurrences, element-wise and with a decayed matrix state. One row, one head, one token at a time.


def elementwise(a, b, h, reset, valid):
  """h_t = a_t h_{t-1} + b_t; a, b [T, E]; what padding gives is left 0."""
  out = np.zeros_like(b)
  for t in range(len(a)):
    if valid[t]:
      h = a[t] * (0 * h if reset[t] else h) + b[t]
      out[t] = h
  return out, h


def decayed_sum(q, k, v, log_decay, S, reset, valid):
  """S = diag(exp g) S + k^T v, o = q S; q, k [T, K], v [T, V], log_decay [T] or [T, K]."""
  out = np.zeros_like(v)
  for t in range(len(q)):
    if valid[t]:
      S = np.diag(np.exp(log_decay[t]) * np.ones(len(S))) @ (0 * S if reset[t] else S)
      S = S + np.outer(k[t], v[t])
      out[t] = q[t] @ S
  return out, S


# Classical recurrent cells (longctx/recurrence/elman, gru, slstm). One step of one row; x is the
# projected input of each gate, biases included.


def elman_cell(x, w_hidden, h):
  """x [E], w_hidden [E, E], h [E]."""
  return np.array([np.tanh(x[e] + sum(h[d] * w_hidden[d, e] for d in range(len(h))))
                   for e in range(len(x))])


def gru_cell(x, w_hidden, b_n, h):
  """x [3, E], w_hidden [E, 3, E], gates r, z, n; b_n [E] is reset with the product."""
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  new = np.zeros_like(h)
  for e in range(len(h)):
    products = [sum(h[d] * w_hidden[d, n, e] for d in range(len(h))) for n in range(3)]
    r, z = sigmoid(x[0, e] + products[0]), sigmoid(x[1, e] + products[1])
    n = np.tanh(x[2, e] + r * (products[2] + b_n[e]))
    new[e] = (1 - z) * n + z * h[e]
  return new


def slstm_cell(x, w_hidden, h, c, n, m=None):
  """x [4, E], w_hidden [H, N, 4, H], gates i, f, z, o; no stabiliser: c and n as the paper's (8).

  With m the incoming c and n are taken times e^m. Returns (h, c, n) and m = 0 if m was given.
  """
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  width, heads = w_hidden.shape[:2]
  if m is not None:
    c, n = c * np.exp(m), n * np.exp(m)
  after = np.zeros((3, len(h)))
  for head in range(heads):
    for j in range(width):
      e = head * width + j
      i, f, z, o = (x[k, e] + sum(h[head * width + d] * w_hidden[d, head, k, j]
                                  for d in range(width)) for k in range(4))
      cell = sigmoid(f) * c[e] + np.exp(i) * np.tanh(z)
      norm = sigmoid(f) * n[e] + np.exp(i)
      after[:, e] = sigmoid(o) * cell / norm, cell, norm
  return (*after,) if m is None else (*after, np.zeros_like(m))


# The delta rule (longctx/recurrence/delta.py): one row and head, number by number.


def delta_rule(q, k, v, beta, log_decay, S, reset, valid):
  """q, k [T, K], v [T, V], beta [T], log_decay [T] or [T, K] or None; S [K, V] -> (out [T, V], S)."""
  out, S = np.zeros((len(q), v.shape[1])), S.copy()
  for t in range(len(q)):
    if not valid[t]:
      continue
    if reset[t]:
      S[:] = 0
    for i in range(len(S)):
      decay = 0 if log_decay is None else log_decay[t] if log_decay.ndim == 1 else log_decay[t, i]
      S[i] *= np.exp(decay)
    wrong = v[t] - k[t] @ S
    for i in range(len(S)):
      S[i] += beta[t] * k[t, i] * wrong
    out[t] = q[t] @ S
  return out, S


def short_conv(x, taps, bias, reset):
  """y_t = bias + sum_j taps[j] x_{t-j} over the tokens of t's document; x [T, C], taps [W, C]."""
  out = np.zeros_like(x)
  for t in range(len(x)):
    out[t] = bias
    for j in range(len(taps)):
      if t - j < 0:
        break
      out[t] += taps[j] * x[t - j]
      if reset[t - j]:
        break
  return out


# The mLSTM (longctx/recurrence/mlstm.py): one row and head, without a stabiliser.


def mlstm(q, k, v, log_input, log_forget, C, n, reset, valid):
  """C, n the memory itself, [K, V] and [K]; h_t = q C / max(|q n|, 1). Returns (h [T, V], C, n)."""
  out, C, n = np.zeros((len(q), v.shape[1])), C.copy(), n.copy()
  for t in range(len(q)):
    if not valid[t]:
      continue
    if reset[t]:
      C[:], n[:] = 0, 0
    forget, new = np.exp(log_forget[t]), np.exp(log_input[t])
    for i in range(len(n)):
      C[i] = forget * C[i] + new * k[t, i] * v[t]
      n[i] = forget * n[i] + new * k[t, i]
    out[t] = q[t] @ C / max(abs(q[t] @ n), 1)
  return out, C, n


def mlstm_parallel(q, k, v, log_input, log_forget):
  """The parallel form of the xLSTM paper (appendix A.3), stabilised by rows; one document."""
  length = len(q)
  b = np.cumsum(log_forget)
  D = np.full((length, length), -np.inf)
  for t in range(length):
    for i in range(t + 1):
      D[t, i] = b[t] - b[i] + log_input[i]
  m = D.max(axis=1, keepdims=True)
  C = q @ k.T * np.exp(D - m)
  return C / np.maximum(np.abs(C.sum(1, keepdims=True)), np.exp(-m)) @ v


# The rule of RWKV-7 (longctx/recurrence/diagonal_low_rank.py): one row and head.


def diagonal_low_rank(q, k, v, erase, rate, log_decay, S, reset, valid):
  """All but v [T, V] are [T, K]; S [K, V]. Returns (out [T, V], S)."""
  out, S = np.zeros((len(q), v.shape[1])), S.copy()
  for t in range(len(q)):
    if not valid[t]:
      continue
    if reset[t]:
      S[:] = 0
    S = ((np.diag(np.exp(log_decay[t])) - np.outer(erase[t] * rate[t], erase[t])) @ S
         + np.outer(k[t], v[t]))
    out[t] = q[t] @ S
  return out, S


# --- Segment memories: one row ---------------------------------------------------------------


def dpfp(x, nu=3):
  """u = [relu x; relu -x]; feature (j, i) is u_i u_{i-j}, j = 1 .. nu; scaled to length 1."""
  u = [max(a, 0.0) for a in x] + [max(-a, 0.0) for a in x]
  features = np.array([u[i] * u[(i - j) % len(u)] for j in range(1, nu + 1) for i in range(len(u))])
  length = np.sqrt(sum(f * f for f in features))
  return features / length if length > 1e-12 else 0 * features


def associative_read(W, z, q):
  """W [F, D], z [F], q [T, A] -> [T, D]."""
  return np.array([dpfp(a) @ W / (dpfp(a) @ z + 1e-5) for a in q])


def associative_write(W, z, k, v, beta, gamma=None):
  """k [M, A], v [M, D], beta [M] -> (W, z, gamma [M]); a gamma that is given is used as it is."""
  W_new, z_new, gammas = W.copy(), z.copy(), []
  for m in range(len(k)):
    key = dpfp(k[m])
    known = key @ z
    gammas.append(min(max(1 - known / (key @ key + 1e-5), 0.0), 1.0) if gamma is None else gamma[m])
    W_new += np.outer(key, beta[m] * (v[m] - key @ W / (known + 1e-5)))
    z_new += gammas[-1] * key
  return W_new, z_new, gammas


# Segment memories.


def infini_feature(x):
  """elu(x) + 1."""
  return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def infini_read(M, z, q):
  """Of one head and segment: q [C, K], M [K, V], z [K] -> [C, V]; an empty memory says 0."""
  out = np.zeros((len(q), M.shape[1]))
  for t in range(len(q)):
    phi = infini_feature(q[t])
    if phi @ z > 0:
      out[t] = phi @ M / (phi @ z)
  return out


def infini_write(M, z, k, v, delta):
  """(M, z) after a segment of one head; every token reads the old memory."""
  old = infini_read(M, z, k) if delta else np.zeros_like(v)
  M, z = M.copy(), z.copy()
  for t in range(len(k)):
    M += np.outer(infini_feature(k[t]), v[t] - old[t])
    z += infini_feature(k[t])
  return M, z


def relative_attention(q, k, v, sees, u, w, bias):
  """Transformer-XL, of one head: q [C, H] at the end of keys [S, H]; bias w . x of D model dims [D, H].

  `w` is the projection of distances, `u` and `bias` the two learned vectors of queries.
  """
  C, S, H, D = len(q), len(k), q.shape[1], len(w)
  out = np.zeros((C, v.shape[1]))
  for i in range(C):
    scores = np.full(S, -np.inf)
    for j in range(S):
      n = (S - C + i) - j
      if n < 0 or not sees[i, j]:
        continue
      angle = n * 10_000.0 ** (-np.arange(0, D, 2) / D)
      r = np.concatenate([np.sin(angle), np.cos(angle)]) @ w
      scores[j] = ((q[i] + u) @ k[j] + (q[i] + bias) @ r) / np.sqrt(H)
    if np.isfinite(scores).any():
      p = np.exp(scores - scores.max())
      out[i] = p / p.sum() @ v
  return out
