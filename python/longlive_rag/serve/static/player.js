// Plays the growing file through Media Source Extensions: byte ranges of whole blocks, fetched as they are wanted.

const AHEAD = 20; // seconds to have loaded before the playhead
const BEHIND = 60; // seconds to keep behind it
const BATCH = 2_000_000; // bytes of one request

export class Player {
  constructor(video, index) {
    this.video = video;
    this.index = index;
    this.follow = true;
    this.working = false;
    this.start = null;
    video.addEventListener("seeking", () => this.feed());
    video.addEventListener("timeupdate", () => this.feed());
  }

  // Begin with a video whose first block is there.
  async open(state) {
    this.close();
    const mine = (this.opened = {});
    this.working = true; // nothing is fed before the head of the file is there
    this.number = state.video;
    this.source = new MediaSource();
    this.video.src = URL.createObjectURL(this.source);
    await new Promise((resolve) => this.source.addEventListener("sourceopen", resolve, { once: true }));
    if (mine !== this.opened) return;
    URL.revokeObjectURL(this.video.src);
    this.buffer = this.source.addSourceBuffer(state.mime);
    this.buffer.mode = "segments";
    const first = await this.index.get(0);
    if (mine !== this.opened || !first) return;
    await this.append(await this.bytes(0, first.offset));
    if (mine !== this.opened) return;
    this.start = Math.max(0, this.index.seconds - 1);
    this.working = false;
    this.feed();
  }

  close() {
    this.opened = this.buffer = null;
    this.working = false; // an append to a buffer that is gone never ends
    this.start = null;
    this.follow = true;
    this.video.removeAttribute("src");
    this.video.load();
  }

  get lead() {
    return this.loadedTo(this.video.currentTime) - this.video.currentTime;
  }

  // End of what is loaded without a gap from a time on; the time itself where nothing is.
  loadedTo(time) {
    const ranges = this.video.buffered;
    for (let i = 0; i < ranges.length; i++) {
      if (ranges.start(i) <= time + 0.05 && time < ranges.end(i)) return ranges.end(i);
    }
    return time;
  }

  async feed() {
    if (this.working || !this.buffer) return;
    this.working = true;
    const mine = this.opened;
    try {
      while (mine === this.opened && (await this.step(mine)));
    } catch (error) {
      if (mine === this.opened && error.name !== "QuotaExceededError") console.warn("loading failed, will try again:", error);
    }
    if (mine === this.opened) this.working = false;
  }

  async step(mine) {
    const here = this.start ?? this.video.currentTime;
    const end = this.start ?? this.loadedTo(here);
    if (end - here > AHEAD || end >= this.index.seconds - 0.01) return false;
    let block = await this.index.at(end + 0.01);
    if (!block || mine !== this.opened) return false;
    const from = block.offset;
    let to = from;
    while (block && block.offset === to && to - from < BATCH && block.time < here + AHEAD + 2) {
      to = block.offset + block.bytes;
      block = this.index.known(block.block + 1);
    }
    const data = await this.bytes(from, to);
    if (mine !== this.opened) return false;
    await this.makeRoom();
    await this.append(data);
    if (this.start !== null) {
      this.video.currentTime = this.start;
      this.start = null;
      this.video.play().catch(() => {});
    }
    return true;
  }

  async bytes(from, to) {
    const range = { Range: `bytes=${from}-${to - 1}` };
    const answer = await fetch(`video.mp4?video=${this.number}`, { headers: range });
    if (!answer.ok) throw new Error(`video.mp4: ${answer.status}`);
    return answer.arrayBuffer();
  }

  append(data) {
    return this.whenDone(() => this.buffer.appendBuffer(data));
  }

  async makeRoom() {
    const ranges = this.video.buffered;
    const old = this.video.currentTime - BEHIND;
    if (ranges.length && ranges.start(0) < old - BEHIND) await this.whenDone(() => this.buffer.remove(0, old));
  }

  whenDone(start) {
    const buffer = this.buffer;
    return new Promise((resolve, reject) => {
      buffer.addEventListener("updateend", resolve, { once: true });
      buffer.addEventListener("error", () => reject(new Error("the browser refused the video")), { once: true });
      start();
    });
  }

  seek(time) {
    const target = Math.max(0, Math.min(time, this.index.seconds - 0.06));
    this.follow = target > this.index.seconds - 1.2;
    this.video.currentTime = target;
    this.feed();
  }

  toNewest() {
    this.seek(this.index.seconds - 0.5);
    this.follow = true;
    this.video.play().catch(() => {});
  }

  // Where pictures are made more slowly than they are played, play more slowly rather than stop and go.
  pace(made) {
    if (!this.buffer || this.video.paused) return;
    const slow = made > 0 ? Math.max(0.2, Math.min(1, made)) : 1;
    const lead = this.lead;
    const rate = lead > 1 ? 1 : lead > 0.5 ? Math.min(1, slow * 1.15) : slow * 0.9;
    if (Math.abs(rate - this.video.playbackRate) > 0.04) this.video.playbackRate = Math.max(0.15, rate);
  }
}

// What is known of the blocks of a video; asks for what is not.
export class Index {
  constructor() {
    this.reset(null, 0);
  }

  reset(video, count) {
    this.video = video;
    this.blocks = [];
    this.count = count;
    this.seconds = 0;
    this.asked = new Map();
  }

  add(block) {
    this.blocks[block.block] = block;
    this.count = Math.max(this.count, block.block + 1);
    this.seconds = Math.max(this.seconds, block.time + block.duration);
  }

  known(number) {
    return this.blocks[number];
  }

  async get(number) {
    if (number < 0 || number >= this.count) return undefined;
    if (!this.blocks[number]) await this.load(Math.floor(number / 500) * 500);
    return this.blocks[number];
  }

  load(first) {
    if (!this.asked.has(first)) {
      const video = this.video;
      const job = fetch(`blocks?video=${video}&from=${first}&to=${first + 500}`)
        .then((answer) => (answer.ok ? answer.json() : { blocks: [] }))
        .then((answer) => {
          if (video === this.video) answer.blocks.forEach((block) => this.add(block));
        })
        .catch(() => {})
        .finally(() => this.asked.delete(first));
      this.asked.set(first, job);
    }
    return this.asked.get(first);
  }

  // The block that is shown at a time. All blocks but the first last equally long.
  async at(time) {
    return this.get(this.number(time));
  }

  number(time) {
    const last = this.blocks[this.count - 1];
    if (!last) return this.blocks.findIndex((block) => block && block.time <= time && time < block.time + block.duration);
    const back = Math.ceil((last.time - time) / last.duration - 1e-6);
    return Math.max(0, Math.min(this.count - 1, time >= last.time ? last.block : last.block - back));
  }

  timeOf(frame) {
    const last = this.blocks[this.count - 1];
    if (!last) return 0;
    const number = Math.floor(frame / last.frames);
    const block = this.blocks[number];
    const begin = block ? block.time : last.time - (last.block - number) * last.duration;
    return begin + ((frame % last.frames) / last.frames) * last.duration;
  }
}
