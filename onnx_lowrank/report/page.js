"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from) => Array.from((from || document).querySelectorAll(selector));
  const one = (id) => document.getElementById(id);

  // light or dark: what the system says, until the button says otherwise
  const theme = one("theme");
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", theme.textContent + " colours"); };
  try { const kept = localStorage.getItem("onnx-lowrank-theme"); if (kept === "dark" || kept === "light") root.dataset.theme = kept; } catch (error) { /* no storage: nothing is kept */ }
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("onnx-lowrank-theme", root.dataset.theme); } catch (error) { /* as above */ }
    label();
  });
  systemDark.addEventListener("change", label);
  label();

  // one tooltip, for the pointer and for the keyboard
  const tip = one("tip");
  const hide = () => { tip.hidden = true; };
  const show = (target) => {
    tip.textContent = target.getAttribute("aria-label");
    tip.hidden = false;
    const box = target.getBoundingClientRect(), width = tip.offsetWidth, height = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), root.clientWidth - width - 8);
    const above = box.top - height - 8;
    tip.style.left = left + "px";
    tip.style.top = (above > 4 ? above : box.bottom + 8) + "px";
  };
  const tipped = (event) => event.target.closest && event.target.closest("[data-tip]");
  document.addEventListener("pointerover", (event) => { const target = tipped(event); if (target) show(target); else hide(); });
  document.addEventListener("focusin", (event) => { const target = tipped(event); if (target) show(target); else hide(); });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", () => {
    const focused = document.activeElement;
    if (!tip.hidden && focused && focused.matches("[data-tip]:focus-visible")) show(focused); else hide();
  }, { passive: true, capture: true });

  // a group of marks is one stop of the Tab key; arrows move within it
  for (const group of all("[data-rove]")) {
    const items = all("[data-tip]", group);
    if (items.length) items[0].tabIndex = 0;
    group.addEventListener("focusin", (event) => {
      const now = event.target.closest("[data-tip]");
      for (const item of items) item.tabIndex = item === now ? 0 : -1;
    });
    group.addEventListener("keydown", (event) => {
      const at = items.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      const next = items[Math.min(Math.max(to, 0), items.length - 1)];
      next.focus({ preventScroll: true });
      next.scrollIntoView({ block: "nearest", inline: "nearest" });
      show(next);
    });
  }

  // a link to a layer opens it
  const opened = () => {
    const target = /^#layer-\d+$/.test(location.hash) && document.querySelector(location.hash);
    if (!target) return;
    target.open = true;
    target.hidden = false;
    target.scrollIntoView({ block: "start" });
    target.querySelector("summary").focus({ preventScroll: true });
  };
  addEventListener("hashchange", opened);
  opened();
  document.addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest("a[href^='#layer-']");
    if (link && link.hash === location.hash) opened();
  });

  // the list of layers
  const layers = all("details.layer");
  const tools = document.querySelector(".tools");
  if (tools) {
    tools.hidden = false;
    const count = () => { const left = layers.filter((layer) => !layer.hidden).length; one("count").textContent = left + " of " + layers.length; };
    one("filter").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/);
      for (const layer of layers) { const text = layer.firstElementChild.textContent.toLowerCase(); layer.hidden = !words.every((word) => text.includes(word)); }
      count();
    });
    one("open").addEventListener("click", () => { for (const layer of layers) layer.open = !layer.hidden; });
    one("close").addEventListener("click", () => { for (const layer of layers) layer.open = false; });
    count();
  }

  const copy = one("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", () => navigator.clipboard.writeText(one("command").textContent).then(() => {
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    }, () => { copy.textContent = "Not allowed"; }));
  }
})();
