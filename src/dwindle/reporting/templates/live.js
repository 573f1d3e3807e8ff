(() => {
  "use strict";
  let known = document.querySelector("main").dataset.state;
  const status = () => document.getElementById("live");
  const keys = (main) => [...main.querySelectorAll(".axes input:checked")].map((input) => input.value);

  async function refresh() {
    const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
    const [before, after] = [document.querySelector("main"), page.querySelector("main")];
    if (!after) return;
    const chosen = keys(before);
    after.querySelectorAll(".axes input").forEach((input) => { input.checked = chosen.includes(input.value) || input.checked; });
    before.replaceWith(after);
    known = after.dataset.state;
    document.title = page.title;
    document.dispatchEvent(new Event("dwindle:start"));
  }

  async function poll() {
    try {
      const answer = await fetch("/state", { cache: "no-store" });
      if (answer.ok) {
        const state = await answer.text();
        if (state !== known) await refresh();
        if (status()) status().textContent = "live, looked " + new Date().toLocaleTimeString();
      }
    } catch (error) {
      if (status()) status().textContent = "the server has ended; this is the last that it showed";
    }
    setTimeout(poll, 3000);
  }
  poll();
})();
