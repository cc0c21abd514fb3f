
"use strict";
// Looks again every few seconds and puts the new answers in the old ones' place, so that
// nothing flickers. Open tables, the focus and the place on the page stay.
(() => {
  const every = Number(document.body.dataset.every) * 1000;
  let tag = "";
  const again = async () => {
    try {
      if (document.hidden) return;
      const answer = await fetch(location.href, tag ? { headers: { "If-None-Match": tag } } : {});
      if (answer.status !== 200) return;
      tag = answer.headers.get("ETag") || "";
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const before = document.getElementById("content"), now = page.getElementById("content");
      if (!before || !now) return;
      for (const open of before.querySelectorAll("details[open]")) {
        const panel = open.closest("[id]");
        now.querySelector("#" + CSS.escape(panel.id) + " details")?.setAttribute("open", "");
      }
      // The head names the time that the answers are about.
      const about = page.querySelector(".about");
      if (about) document.querySelector(".about")?.replaceChildren(...about.childNodes);
      const active = document.activeElement;
      if (before.innerHTML === now.innerHTML) return;
      const at = before.contains(active) ? [...before.querySelectorAll("a,summary,[tabindex]")].indexOf(active) : -1;
      const top = window.scrollY;
      before.replaceChildren(...now.childNodes);
      window.scrollTo({ top, behavior: "instant" });
      if (at >= 0) before.querySelectorAll("a,summary,[tabindex]")[at]?.focus({ preventScroll: true });
    } catch {
      // The server is away or busy: the next look may find it.
    } finally {
      setTimeout(again, every);
    }
  };
  setTimeout(again, every);
})();
