"use strict";
// Chance: a seeded generator, and the exact binomial test of a vote.

/** Numbers in [0, 1) from a text, the same in every browser: xorshift32 (Marsaglia 2003), started by FNV-1a. */
function randomFrom(text) {
  let state = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) state = Math.imul(state ^ byte, 0x01000193);
  state = state >>> 0 || 1;
  const next = () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 8; i++) next();  // Texts that differ in their end only begin alike.
  return next;
}

/** A copy of `list` in random order. */
function shuffled(list, random) {
  const out = [...list];
  for (let i = out.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [out[i], out[j]] = [out[j], out[i]];
  }
  return out;
}

/** P(X >= k) of a binomial distribution of n draws with probability p. */
function upperTail(k, n, p) {
  if (k <= 0) return 1;
  if (p <= 0) return 0;
  if (p >= 1) return 1;
  let logChoose = 0, sum = 0;
  for (let i = 0; i <= n; i++) {
    if (i > 0) logChoose += Math.log(n - i + 1) - Math.log(i);
    if (i >= k) sum += Math.exp(logChoose + i * Math.log(p) + (n - i) * Math.log1p(-p));
  }
  return Math.min(1, sum);
}

/** Where a rising function of [0, 1] reaches `target`. */
function solve(rising, target) {
  let low = 0, high = 1;
  for (let i = 0; i < 60; i++) {
    const middle = (low + high) / 2;
    if (rising(middle) < target) low = middle; else high = middle;
  }
  return (low + high) / 2;
}

/** The sign test of wins against losses, ties left out: two-sided p of a fair coin, and the share of wins with its
 * exact 95% confidence interval (Clopper and Pearson 1934). */
function signTest(wins, losses) {
  const n = wins + losses;
  if (!n) return {n, p: 1, share: NaN, low: 0, high: 1};
  const p = Math.min(1, 2 * Math.min(upperTail(wins, n, 0.5), upperTail(losses, n, 0.5)));
  const low = wins ? solve((q) => upperTail(wins, n, q), 0.025) : 0;
  const high = losses ? solve((q) => upperTail(wins + 1, n, q), 0.975) : 1;
  return {n, p, share: wins / n, low, high};
}

/** How many of n must go one way for p <= 0.05; null where n is too small for that. */
function needed(n) {
  for (let k = Math.ceil(n / 2); k <= n; k++) if (2 * upperTail(k, n, 0.5) <= 0.05) return k;
  return null;
}
