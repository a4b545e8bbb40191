"use strict";
// Makes columns of numbers of what report/timeline.py has packed.

const SHARES = ["compute", "exchange", "merge"]; // parts of a device's time

async function inflated(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// A run's ranks, each with its lanes: times in seconds, and columns of what fills the spans.
async function unpacked(run) {
  const buffer = await inflated(run.columns);
  const total = (names) =>
    run.ranks.reduce((sum, rank) => sum + names.reduce((n, name) => n + rank[name], 0), 0);
  const spans = total(["main", "read", "write"]);
  const samples = total(["device"]);
  let at = 0;
  const column = (Type, length) => {
    const found = new Type(buffer, at, length);
    at += found.byteLength;
    return found;
  };
  const [gap, length, step] = [0, 1, 2].map(() => column(Int32Array, spans));
  const [sampleGap, sampleLength] = [0, 1].map(() => column(Int32Array, samples));
  const number = column(Uint16Array, spans);
  const [phase, fill] = [0, 1].map(() => column(Uint8Array, spans));
  const shares = SHARES.map(() => column(Uint8Array, samples));
  const item = new Int32Array(spans);
  for (let n = 0, last = 0; n < spans; n++) item[n] = last += step[n];

  const timed = (gaps, lengths, from, count) => {
    const start = new Float64Array(count);
    const end = new Float64Array(count);
    for (let n = 0, tick = 0; n < count; n++) {
      tick += gaps[from + n];
      start[n] = tick * run.tick;
      tick += lengths[from + n];
      end[n] = tick * run.tick;
    }
    return { start, end };
  };
  let span = 0;
  let sample = 0;
  return run.ranks.map((rank) => {
    const lanes = {};
    for (const thread of ["main", "read", "write"]) {
      const [from, to] = [span, (span += rank[thread])];
      lanes[thread] = {
        ...timed(gap, length, from, to - from),
        phase: phase.subarray(from, to),
        fill: fill.subarray(from, to),
        item: item.subarray(from, to),
        number: number.subarray(from, to),
      };
    }
    const [from, to] = [sample, (sample += rank.device)];
    lanes.device = {
      ...timed(sampleGap, sampleLength, from, to - from),
      shares: shares.map((share) => share.subarray(from, to)),
    };
    return { name: `rank ${rank.rank}`, host: rank.host, lanes };
  });
}
