"use strict";
// Ballots: which pairs a voter sees, what was chosen, and how the ballots of a team come together. No page here.
//
// A ballot is {voter, setting, pairs, blind, votes: [{shown: [code, code], chosen: code or null}]}. Codes name images
// without saying what they are of, so that a file of votes betrays nothing to those who have yet to vote.

const VOTES_FORMAT = "guidance-interval-votes/1";

/** A reason to refuse votes: the key of a sentence and what it names. */
class VotesError extends Error {
  constructor(key, values = {}) {
    super(key);
    this.key = key;
    this.values = values;
  }
}

/** {code: {setting, index}} of every confirmed image. */
function imagesByCode(study) {
  const found = new Map();
  study.settings.forEach((s) => s.codes.forEach((code, index) => found.set(code, {setting: s.id, index})));
  return found;
}

/** Every pair of a setting with the baseline in a voter's own order, its first image to be shown first. The order
 * goes through all prompts before any comes again, so that a part of it covers them evenly. */
function plan(study, setting, voter) {
  const random = randomFrom(`${study.id}\n${setting}\n${voter}`);
  const [baseline] = study.settings, rival = study.settings.find((s) => s.id === setting);
  const num = study.seeds.length;
  const seeds = study.prompts.map(() => shuffled([...Array(num).keys()], random));
  const pairs = [];
  for (let round = 0; round < num; round++) {
    for (const prompt of shuffled([...study.prompts.keys()], random)) {
      const index = prompt * num + seeds[prompt][round];
      pairs.push(shuffled([baseline.codes[index], rival.codes[index]], random));
    }
  }
  return pairs;
}

/** The next pair of a ballot, or null when it is done. */
function nextPair(study, ballot) {
  if (isDone(ballot)) return null;
  const seen = new Set(ballot.votes.flatMap((v) => v.shown));
  return plan(study, ballot.setting, ballot.voter).find((pair) => !pair.some((code) => seen.has(code))) ?? null;
}

function isDone(ballot) {
  return ballot.votes.length >= ballot.pairs;
}

/** Names are the same whatever their case and spaces. */
function sameVoter(a, b) {
  const plain = (name) => name.normalize("NFKC").trim().replace(/\s+/g, " ").toLowerCase();
  return plain(a) === plain(b);
}

function findBallot(ballots, voter, setting) {
  return ballots.find((b) => b.setting === setting && sameVoter(b.voter, voter));
}

function votesFile(study, ballots) {
  return JSON.stringify({format: VOTES_FORMAT, study: study.name, id: study.id, ballots}, null, 1) + "\n";
}

/** The ballots of a file of votes; throws VotesError for what is none, is of another study, or is damaged. */
function readVotes(text, study) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new VotesError("import.notJson");
  }
  if (file === null || file.format !== VOTES_FORMAT || !Array.isArray(file.ballots)) throw new VotesError("import.notVotes");
  if (file.id !== study.id) throw new VotesError("import.otherStudy", {study: String(file.study), here: study.name});
  return checkedBallots(file.ballots, study);
}

/** The same ballots, of nothing but what a ballot holds; throws VotesError where one cannot be of this study. */
function checkedBallots(ballots, study) {
  const known = imagesByCode(study);
  return ballots.map((b) => {
    const damaged = () => new VotesError("import.damaged", {voter: String(b?.voter)});
    const rival = study.settings.slice(1).some((s) => s.id === b?.setting);
    if (!rival || typeof b.voter !== "string" || !b.voter.trim() || !Array.isArray(b.votes)) throw damaged();
    const total = study.prompts.length * study.seeds.length;
    if (!Number.isInteger(b.pairs) || b.pairs < 1 || b.pairs > total || b.votes.length > b.pairs) throw damaged();
    const seen = new Set();
    const votes = b.votes.map((v) => {
      const [one, two] = [0, 1].map((i) => known.get(v?.shown?.[i]));
      const pair = one && two && one.index === two.index && [one.setting, two.setting].sort().join() ===
        [study.settings[0].id, b.setting].sort().join();
      if (!pair || seen.has(one.index) || !(v.chosen === null || v.shown.includes(v.chosen))) throw damaged();
      seen.add(one.index);
      return {shown: v.shown.slice(0, 2), chosen: v.chosen};
    });
    return {voter: b.voter.trim(), setting: b.setting, pairs: b.pairs, blind: b.blind === true, votes};
  });
}

/** Whether `longer` goes on where `shorter` stopped. */
function continues(longer, shorter) {
  return shorter.votes.every((v, i) => JSON.stringify(v) === JSON.stringify(longer.votes[i]));
}

/** {ballots, said}: ballots with `incoming` added, and what became of each, as keys of sentences. A voter counts once
 * for a setting: of two ballots one must go on where the other stopped, else the incoming one is refused. */
function mergeBallots(ballots, incoming) {
  const out = [...ballots], said = [];
  for (const b of incoming) {
    const i = out.findIndex((o) => o.setting === b.setting && sameVoter(o.voter, b.voter));
    const values = {voter: b.voter, votes: b.votes.length};
    if (i < 0) {
      out.push(b);
      said.push(["import.added", values]);
    } else if (continues(out[i], b)) {
      said.push(["import.known", values]);
    } else if (continues(b, out[i])) {
      out[i] = b;
      said.push(["import.continued", values]);
    } else {
      said.push(["import.twice", values]);
    }
  }
  return {ballots: out, said};
}

/** What the ballots say of a setting: {pairs: [{index, wins, losses, ties}], votes, wins, losses, ties, test}.
 *
 * A pair counts once, for the side that more of its votes chose: several votes on one pair are of the same two images,
 * and would make the confidence interval too narrow if they counted as so many pairs. */
function tally(study, ballots, setting) {
  const known = imagesByCode(study), pairs = new Map();
  let votes = 0;
  for (const vote of ballots.filter((b) => b.setting === setting).flatMap((b) => b.votes)) {
    const index = known.get(vote.shown[0]).index;
    if (!pairs.has(index)) pairs.set(index, {index, wins: 0, losses: 0, ties: 0});
    const pair = pairs.get(index);
    if (vote.chosen === null) pair.ties++;
    else if (known.get(vote.chosen).setting === setting) pair.wins++;
    else pair.losses++;
    votes++;
  }
  const list = [...pairs.values()].sort((a, b) => a.index - b.index);
  const wins = list.filter((p) => p.wins > p.losses).length, losses = list.filter((p) => p.wins < p.losses).length;
  return {pairs: list, votes, wins, losses, ties: list.length - wins - losses, test: signTest(wins, losses)};
}
