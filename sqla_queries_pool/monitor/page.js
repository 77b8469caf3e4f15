"use strict";
// Asks for this page once per second and puts into place what has changed. All of it is made, and escaped, by the server.
(() => {
  const EVERY = 1000, TIMEOUT = 5000, FORGET = 20000, STEADY = 8000; // milliseconds
  const get = (id) => document.getElementById(id);
  const seen = new Map(); // process -> its last <main>, and when it came
  const heights = new WeakMap(); // element -> its height, and how long to keep it
  let chosen = document.querySelector("main").dataset.process;
  let paused = false, timer = 0, asking = false, lost = false, last = get("clock").textContent;

  function say(kind, text) {
    const status = get("status");
    status.className = kind;
    if (status.textContent !== text) status.textContent = text; // once: it is read aloud
    document.body.classList.toggle("stale", kind === "lost");
  }

  function morph(old, fresh) {
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
      old.replaceWith(document.importNode(fresh, true));
    } else if (old.nodeType === Node.TEXT_NODE) {
      if (old.data !== fresh.data) old.data = fresh.data;
    } else {
      for (const { name, value } of fresh.attributes) {
        if (old.getAttribute(name) !== value) old.setAttribute(name, value);
      }
      for (const { name } of [...old.attributes]) { // what the reader has opened stays open
        if (!fresh.hasAttribute(name) && name !== "open" && name !== "style") old.removeAttribute(name);
      }
      morphChildren(old, fresh);
    }
  }

  function morphChildren(old, fresh) {
    const keyed = new Map([...old.children].filter((e) => e.dataset.key).map((e) => [e.dataset.key, e]));
    const wanted = new Set([...fresh.children].map((e) => e.dataset.key));
    for (const [key, element] of keyed) if (!wanted.has(key)) element.remove();
    let place = old.firstChild;
    for (const child of [...fresh.childNodes]) {
      const key = child.dataset && child.dataset.key;
      let match = key ? keyed.get(key) : place;
      if (!key && match && match.dataset && match.dataset.key) match = null; // that one is somebody else's
      if (!match) {
        old.insertBefore(document.importNode(child, true), place);
        continue;
      }
      if (match === place) place = place.nextSibling;
      else old.insertBefore(match, place);
      morph(match, child);
    }
    while (place) {
      const next = place.nextSibling;
      place.remove();
      place = next;
    }
  }

  // Holders and waiting checkouts change all the time: what is below them keeps its place for a while.
  function steady() {
    const now = Date.now();
    for (const element of document.querySelectorAll(".tables")) {
      const before = heights.get(element) || { height: 0, until: 0 };
      element.style.minHeight = "";
      const height = element.offsetHeight;
      const kept = height >= before.height || now > before.until ? { height, until: now + STEADY } : before;
      heights.set(element, kept);
      element.style.minHeight = `${kept.height}px`;
    }
  }

  function show() {
    const main = seen.get(chosen).main;
    morph(document.querySelector("main"), main);
    steady();
    last = main.dataset.taken;
    get("clock").textContent = last;
    const several = seen.size > 1;
    get("processes").hidden = !several;
    if (!several) return;
    const buttons = [...seen.keys()].sort().map((process) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.key = button.dataset.process = process;
      button.textContent = `process ${process}`;
      button.setAttribute("aria-pressed", String(process === chosen));
      return button;
    });
    const nav = document.createElement("nav");
    nav.replaceChildren(...buttons);
    morphChildren(get("processes"), nav);
  }

  function came(main) {
    const now = Date.now();
    if (lost) seen.clear(); // holders from before may be gone
    lost = false;
    seen.set(main.dataset.process, { main, at: now });
    for (const [process, { at }] of seen) if (now - at > FORGET) seen.delete(process);
    if (!seen.has(chosen)) chosen = main.dataset.process;
    show();
  }

  async function ask() {
    if (asking || paused || document.hidden) return;
    asking = true;
    const end = new AbortController(), alarm = setTimeout(() => end.abort(), TIMEOUT);
    try {
      const answer = await fetch(location.href.split("#")[0], { cache: "no-store", signal: end.signal });
      if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
      const main = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
      if (!main || !main.dataset.process) throw new Error("the server answered something else");
      if (!paused && !document.hidden) {
        came(main);
        say("live", "Live");
      }
    } catch (error) {
      lost = true;
      const why = error.message.startsWith("the server") ? error.message : "no answer";
      if (!paused && !document.hidden) say("lost", `${why}; showing ${last}. Trying again.`);
    } finally {
      clearTimeout(alarm);
      asking = false;
      timer = setTimeout(ask, EVERY);
    }
  }

  function change() {
    clearTimeout(timer);
    const button = get("pause");
    button.textContent = paused ? "Resume" : "Pause";
    button.setAttribute("aria-pressed", String(paused));
    if (paused || document.hidden) say("paused", paused ? "Paused" : "Paused while the page is hidden");
    else ask();
  }

  get("pause").hidden = false;
  get("pause").addEventListener("click", () => { paused = !paused; change(); });
  get("processes").addEventListener("click", (event) => {
    if (!event.target.dataset.process) return;
    chosen = event.target.dataset.process;
    show();
  });
  document.addEventListener("visibilitychange", change);
  change();
})();
