// The page: what the server says, what the viewer does, and what is shown of both.

import { Index, Player } from "./player.js";
import { Socket } from "./socket.js";
import { Timeline, clock } from "./timeline.js";
import { PromptBox } from "./prompt.js";

const $ = (id) => document.getElementById(id);
const video = $("video");
const index = new Index();
const player = new Player(video, index);
const timeline = new Timeline($("timeline"), $("track"), index, {
  colour: (prompt) => `tone-${tone(prompt)}`,
  seek: (time) => player.seek(time),
  label: (time) => `${clock(time)} of ${clock(index.seconds)}`,
});
let state = null;
let made = 1; // seconds of video made in a second
let shownBlock = -1;
let trouble = null;
const pendingMarks = [];
const tones = new Map();

const socket = new Socket(hear, (reason) => {
  status("lost", reason || "The server does not answer; trying again …");
});
const promptBox = new PromptBox($("prompt-form"), $("prompt"), (text) => ask({ text }));

function hear(message) {
  const hearers = {
    hello: () => begin(message.state),
    video: () => begin(message.state),
    block: () => grown(message),
    prompt: () => chosen(message.prompt, message.camera),
    pause: () => held(true),
    resume: () => held(false),
    trouble: () => complain(message.message, true),
    rebuilding: () => status("busy", `Remembering block ${message.block} …`),
    viewers: () => {
      state.viewers = message.viewers;
      tellStatus();
    },
    error: () => complain(message.message),
  };
  hearers[message.type]?.();
}

async function begin(next) {
  if (!window.MediaSource) {
    $("cover").textContent = "This browser cannot play a video while it grows. What there is so far is at /video.mp4.";
    complain("This browser lacks Media Source Extensions.", true);
    return;
  }
  const again = state && state.video === next.video && player.opened;
  state = next;
  describe();
  complain(next.trouble, Boolean(next.trouble));
  held(next.paused);
  chosen(next.prompt, next.camera);
  if (again) {
    index.count = next.blocks;
    await index.get(next.blocks - 1);
    player.feed();
    return;
  }
  player.close();
  timeline.reset();
  index.reset(next.video, next.blocks);
  shownBlock = -1;
  $("cover").hidden = false;
  showMemory(null);
  timeline.draw();
  if (next.blocks) {
    await index.get(next.blocks - 1);
    await player.open(next);
    for (let first = 0; first < next.blocks && state === next; first += 500) await index.get(first);
    timeline.draw();
  }
}

async function grown(block) {
  if (!state || block.video !== state.video) return;
  const first = index.count === 0;
  if (block.block > index.count) await index.get(block.block - 1);
  index.add(block);
  state.blocks = block.block + 1;
  made = 0.8 * made + 0.2 * (block.duration / block.seconds);
  if (trouble) complain(null);
  if (first) {
    state = await (await fetch("state")).json();
    await player.open(state);
  }
  player.feed();
  tellStatus();
  timeline.draw();
}

// ---- what the viewer does -----------------------------------------------------------------------------------------

async function ask(fields) {
  try {
    const answer = await socket.command("prompt", fields);
    if (fields.text) pendingMarks.push({ video: answer.video, block: answer.block, prompt: answer.prompt });
    complain(null);
    return true;
  } catch (error) {
    complain(error.message);
    return false;
  }
}

async function command(type, fields, then) {
  try {
    const answer = await socket.command(type, fields);
    then?.(answer);
  } catch (error) {
    complain(error.message);
  }
}

function togglePlay() {
  if (video.paused) video.play().catch(() => {});
  else video.pause();
}

function save() {
  command("save", {}, (answer) => {
    const link = document.createElement("a");
    link.href = answer.url;
    link.download = answer.file;
    link.click();
    announce(`Saved as ${answer.file}.`);
  });
}

function newVideo() {
  const policies = [...$("policies").querySelectorAll("input:checked")].map((box) => box.value);
  if (!policies.length) complain("Choose at least one of the ways to remember.");
  else command("new", { policies });
}

$("play").addEventListener("click", togglePlay);
$("live").addEventListener("click", () => player.toNewest());
$("save").addEventListener("click", save);
$("hold").addEventListener("click", () => command(state?.paused || trouble ? "resume" : "pause", {}, () => complain(null)));
$("new").addEventListener("submit", (event) => {
  event.preventDefault();
  newVideo();
});
for (const radio of document.querySelectorAll("input[name=camera]")) {
  radio.addEventListener("change", () => ask({ camera: radio.value }));
}
$("timeline").addEventListener("keydown", (event) => {
  const steps = { Home: -Infinity, End: Infinity, PageUp: 10, PageDown: -10 };
  if (event.key in steps) {
    event.preventDefault();
    player.seek(Math.max(0, Math.min(index.seconds, video.currentTime + steps[event.key])));
  }
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("textarea, input[type=text]")) return;
  const onControl = event.target.matches("button, input, a, summary");
  const keys = {
    ArrowLeft: () => player.seek(video.currentTime - 2),
    ArrowRight: () => player.seek(video.currentTime + 2),
    l: () => player.toNewest(),
    h: () => $("hold").click(),
    s: save,
    n: newVideo,
    c: () => state?.places.length && ask({ camera: state.camera === "cut" ? "pan" : "cut" }),
  };
  if (!onControl) keys[" "] = togglePlay;
  if (event.target.matches("input[type=radio]")) delete keys.ArrowLeft, delete keys.ArrowRight;
  const place = state?.places[Number(event.key) - 1];
  const act = place ? () => ask({ text: place }) : keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) {
    event.preventDefault();
    act();
  }
});

// ---- what is shown ------------------------------------------------------------------------------------------------

function describe() {
  document.documentElement.style.setProperty("--panels", state.policies.length);
  document.documentElement.style.setProperty("--aspect", state.aspect);
  video.classList.toggle("pixels", state.enlarge > 1);
  $("captions").replaceChildren(
    ...state.policies.map((name) => {
      const [head, ...rest] = state.offered[name].split(": ");
      return element("p", { className: head === "forgets" ? "forgets" : "remembers" }, element("b", {}, head), ` ${rest.join(": ")}`);
    }),
  );
  const places = state.places.length > 0;
  $("steer-title").textContent = places ? "Go to" : "Steer it";
  $("prompt-form").hidden = places;
  $("cameras").hidden = $("keys-places").hidden = $("places").hidden = !places;
  if ($("places").childElementCount !== state.places.length) {
    $("places").replaceChildren(
      ...state.places.map((place, number) =>
        element("button", { type: "button", className: `place tone-${number}`, value: place, title: `${place} (${number + 1})`, onclick: () => ask({ text: place }) }, element("span", {}, place)),
      ),
    );
  }
  $("policies").replaceChildren(
    ...Object.entries(state.offered).map(([name, label]) => {
      const box = element("input", { type: "checkbox", value: name, checked: state.policies.includes(name) });
      return element("label", {}, box, element("span", {}, label));
    }),
  );
  $("facts").textContent = `Video ${state.video} · ${state.scene} · seed ${state.seed} · ${state.fps} pictures a second`;
}

function chosen(prompt, camera) {
  Object.assign(state, { prompt, camera });
  for (const button of $("places").children) button.setAttribute("aria-pressed", String(button.value === prompt));
  for (const radio of document.querySelectorAll("input[name=camera]")) radio.checked = radio.value === camera;
  promptBox.current(prompt);
}

function held(paused) {
  if (state) state.paused = paused;
  $("hold").textContent = paused || trouble ? "Go on" : "Hold";
  tellStatus();
}

function tellStatus() {
  if (!state) return;
  const viewers = state.viewers > 1 ? ` · ${state.viewers} watching` : "";
  if (trouble) status("lost", "Something went wrong");
  else if (state.paused) status("idle", `Not growing · ${clock(index.seconds)} so far${viewers}`);
  else status("live", `Growing · ${clock(index.seconds)} so far · ${(made * state.fps).toFixed(1)} pictures a second${viewers}`);
}

function status(kind, text) {
  $("status").dataset.kind = kind;
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
}

function complain(text, lasting = false) {
  trouble = lasting ? text : null;
  $("trouble").textContent = text ?? "";
  $("trouble").hidden = !text;
  if (state) held(state.paused);
}

function announce(text) {
  $("live-region").textContent = text;
}

function tone(prompt) {
  const place = state?.places.indexOf(prompt) ?? -1;
  if (place >= 0) return place;
  if (!tones.has(prompt)) tones.set(prompt, tones.size % 4); // in order, so that neighbours differ
  return tones.get(prompt);
}

// The newest policy from the right that remembers: its memory is shown.
function memoryOf(block) {
  for (let panel = state.policies.length - 1; panel >= 0; panel--) {
    const retrieved = block?.retrieved[panel];
    if (retrieved) {
      return retrieved.frames.map((frame, i) => ({ frame, panel, similarity: retrieved.similarity[i], time: index.timeOf(frame) }));
    }
  }
  return null;
}

// What the newest policy's memory holds, in all tiers.
function holdings(block) {
  const { forgotten, ...tiers } = block.memory[block.memory.length - 1];
  const all = Object.values(tiers).reduce((sum, tier) => sum + tier.frames, 0);
  return `Holds ${all} of ${block.frame + block.frames} moments${forgotten ? `; the most repetitive were let go` : ""}.`;
}

function showMemory(recalled) {
  $("memory-note").hidden = Boolean(recalled?.length);
  const old = [...$("memory").children];
  const items = (recalled ?? []).map(({ frame, panel, similarity, time }) => {
    const key = `${state.video}/${frame}/${panel}`;
    const item = old.find((each) => each.dataset.key === key) ?? element("li", {});
    if (item.dataset.key !== key) {
      item.dataset.key = key;
      const picture = element("img", { src: `thumbnails/${key}.jpg`, alt: "", width: 120, height: 120, className: state.enlarge > 1 ? "pixels" : "" });
      item.append(element("button", { type: "button", onclick: () => player.seek(time) }, picture, element("span", { className: "when" }), element("span", { className: "bar" }, element("i", {})), element("span", { className: "like" })));
    }
    item.querySelector(".when").textContent = clock(time);
    item.querySelector(".like").textContent = similarity.toFixed(2);
    item.querySelector("i").style.width = `${Math.max(0, Math.min(1, similarity)) * 100}%`;
    item.firstChild.setAttribute("aria-label", `Go to ${clock(time)}, similarity ${similarity.toFixed(2)}`);
    return item;
  });
  if (items.length !== old.length || items.some((item, i) => item !== old[i])) $("memory").replaceChildren(...items);
}

function look() {
  if (state && index.count) {
    const block = index.known(index.number(video.currentTime));
    const recalled = memoryOf(block) ?? [];
    timeline.show(video.currentTime, recalled);
    if (block && block.block !== shownBlock) {
      shownBlock = block.block;
      showMemory(recalled);
      $("held").textContent = holdings(block);
      document.documentElement.dataset.tone = tone(block.shot.prompt);
      const mark = pendingMarks.findIndex((each) => each.video < state.video || each.block <= block.block);
      if (mark >= 0) {
        const { prompt } = pendingMarks.splice(mark, 1)[0];
        announce(`Now: ${prompt}.${recalled.length ? ` Memory gave back ${recalled.map((each) => clock(each.time)).join(" and ")}.` : ""}`);
      }
    }
    $("clock").textContent = `${clock(video.currentTime)} / ${clock(index.seconds)}`;
    const newest = index.seconds - video.currentTime < 2.5;
    $("live").setAttribute("aria-pressed", String(newest));
    $("play").dataset.state = video.paused ? "paused" : "playing";
    $("play").setAttribute("aria-label", video.paused ? "Play" : "Pause");
    player.pace(made);
  }
  if (video.requestVideoFrameCallback && !video.paused && !document.hidden) requestAnimationFrame(look);
  else setTimeout(look, 200);
}

function element(kind, properties, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

video.addEventListener("playing", () => ($("cover").hidden = true));
setInterval(() => {
  if (state && player.opened) socket.tell("watching", { video: state.video, seconds: video.currentTime || 0 });
}, 400);
look();
