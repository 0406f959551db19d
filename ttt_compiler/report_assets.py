"""Style and script of the page of ``report_html.py``.

Every colour belongs to a role or a status and has a light and a dark value; nothing is told by colour
alone. The page works without the script: a link selects a site by ``:target``, and the first site is
shown when none is selected. May be changed here: looks. The script touches nothing but the selection.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--card:#f6f8fa;
--wire:#646d76;--link:#0a58ca;--fast:#0b5fad;--on-fast:#fff;--refused:#a40e26;--out:#57606a;
--x:#e3f0e3;--x-l:#236a27;--up:#e8eefc;--up-l:#3b5bb5;--act:#fbf0d9;--act-l:#855800;
--mul:#f6e8fb;--mul-l:#8a3fa5;--h:#fde7dc;--h-l:#9c4212;--res:#e0f2f1;--res-l:#0b7268}
@media (prefers-color-scheme:dark){:root{--bg:#0f1318;--ink:#e6edf3;--soft:#9da7b1;--line:#333b45;
--card:#171c23;--wire:#8b949e;--link:#79b8ff;--fast:#4ea1f3;--on-fast:#06121f;--refused:#ff8f8f;--out:#9da7b1;
--x:#16301a;--x-l:#6fc276;--up:#1b2747;--up-l:#8ea9f5;--act:#35290c;--act-l:#e3b341;
--mul:#321c3c;--mul-l:#d19be6;--h:#3a2014;--h-l:#f0955f;--res:#0f302e;--res-l:#5fc9bd}}
@media print{:root{color-scheme:light;--bg:#fff;--ink:#000;--soft:#444;--line:#bbb;--card:#fff;--wire:#555;
--link:#000;--fast:#0b5fad;--on-fast:#fff;--refused:#a40e26;--out:#444;--x:#fff;--x-l:#2f7d32;--up:#fff;
--up-l:#3b5bb5;--act:#fff;--act-l:#9a6700;--mul:#fff;--mul-l:#8a3fa5;--h:#fff;--h-l:#b4501c;--res:#fff;
--res-l:#0b7268}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.35rem;line-height:1.3;margin:.2rem 0 1rem}h2{font-size:1.1rem;margin:1.6rem 0 .5rem}
a{color:var(--link)}:focus-visible{outline:3px solid var(--link);outline-offset:2px}
code,.mono{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86em}
.soft{color:var(--soft)}.problems{border-left:5px solid var(--refused);background:var(--card);
padding:.4rem 1rem;white-space:pre-wrap}.problems h2{margin-top:.2rem}
.main{display:grid;grid-template-columns:minmax(0,21rem) minmax(0,1fr);gap:0 2rem}
@media (max-width:52rem){.main{grid-template-columns:minmax(0,1fr)}ol.blocks{max-height:19rem}}
.blocks{position:relative;list-style:none;margin:0;padding:2px .5rem 2px 2px;overflow:auto;max-height:58rem}
.block{display:flex;gap:.6rem;border:1px solid var(--line);border-radius:7px;background:var(--card);
padding:.3rem .6rem;margin-bottom:.35rem}.block>b{flex:0 0 2.2rem;text-align:right;font-weight:600}
.block>div{flex:1;min-width:0}.block .none{padding:.1rem .4rem;color:var(--soft)}
a.mlp{display:block;color:inherit;text-decoration:none;border-radius:5px;padding:.1rem .4rem;
border-left:4px solid var(--line)}a.mlp:hover{background:var(--line)}a.mlp.fast{border-color:var(--fast)}
a.mlp.refused{border-color:var(--refused);border-left-style:dashed}a.mlp.out{border-left-style:dotted;
border-color:var(--out)}a.mlp[aria-current]{outline:2px solid var(--link)}
.status{font-weight:600;font-size:.9em}.fast>.status{color:var(--fast)}.refused>.status{color:var(--refused)}
.out>.status{color:var(--out)}a.mlp small{display:block;color:var(--soft)}
select{font:inherit;width:100%;max-width:40rem;padding:.35rem;color:var(--ink);background:var(--card);
border:1px solid var(--wire);border-radius:6px}.picker{display:none}.js .picker{display:block}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;margin:.6rem 0}
dt{color:var(--soft)}dd{margin:0}@media (max-width:30rem){dl{grid-template-columns:minmax(0,1fr);gap:0}
dd{margin:0 0 .35rem}}
figure{margin:.6rem 0;overflow-x:auto}figcaption,.legend{color:var(--soft);font-size:.9em}
svg{display:block;max-width:100%;height:auto}
svg text{font:12px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:var(--ink)}
svg .op{font-weight:600}svg .shape{fill:var(--soft)}svg .role{font-size:11px;fill:var(--l)}
.node rect{fill:var(--f);stroke:var(--l);stroke-width:1.4}.node{--f:var(--card);--l:var(--wire)}
.wire{fill:none;stroke:var(--wire);stroke-width:1.5}.hidden{stroke-dasharray:2 5}.tip{fill:var(--wire)}
.r-x{--f:var(--x);--l:var(--x-l)}.r-up{--f:var(--up);--l:var(--up-l)}.r-activation{--f:var(--act);
--l:var(--act-l)}.r-multiply{--f:var(--mul);--l:var(--mul-l)}.r-h{--f:var(--h);--l:var(--h-l)}
.r-residual,.r-stream{--f:var(--res);--l:var(--res-l)}.r-input rect{stroke-dasharray:5 3}
.r-down{--f:var(--up);--l:var(--up-l)}.r-down rect{stroke-width:2.6}
.fastmark{display:none}
.flow.first-fast:not(:has(.site:target)) .r-down,.flow:has(.site.fast:target) .r-down{--f:var(--fast);
--l:var(--fast)}
.flow.first-fast:not(:has(.site:target)) .r-down text,.flow:has(.site.fast:target) .r-down text{
fill:var(--on-fast)}
.flow.first-fast:not(:has(.site:target)) .fastmark,.flow:has(.site.fast:target) .fastmark{display:inline;
font-weight:700}
.flow.first-fast:not(:has(.site:target)) .slowmark,.flow:has(.site.fast:target) .slowmark{display:none}
@supports selector(:has(*)){
.site,.flow{display:none}.site:target,.flow:has(.site:target){display:block}
.flows:not(:has(:target)) .flow.first,.flows:not(:has(:target)) .site.first{display:block}}
.site{scroll-margin-top:5rem}.site h3{margin:.6rem 0 .2rem;font-size:1rem}
details{margin:.4rem 0}summary{cursor:pointer}ol.text{padding-left:2rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;
border-bottom:1px solid var(--line)}th{font-weight:600}th[scope]{width:11rem}td.n,th.n{width:4rem;
text-align:right}
@media print{body{max-width:none;font-size:11pt}.main{display:block}.blocks{overflow:visible;max-height:none}
.picker,.js .picker{display:none}ol.blocks{max-height:none}.block,figure{break-inside:avoid}
svg{max-height:22cm}a{text-decoration:none}}
"""

SCRIPT = """
(() => {
  const picker = document.getElementById("picker");
  if (!picker) return;
  document.documentElement.classList.add("js");
  const show = () => {
    const wanted = document.getElementById(location.hash.slice(1));
    const site = wanted && wanted.classList.contains("site") ? wanted : document.querySelector(".site.first");
    if (!site) return;
    picker.value = site.id;
    for (const link of document.querySelectorAll("a.mlp")) {
      link.removeAttribute("aria-current");
      if (link.getAttribute("href") !== "#" + site.id) continue;
      link.setAttribute("aria-current", "true");
      const list = link.closest(".blocks");
      const top = link.closest(".block").offsetTop;
      if (top < list.scrollTop || top + link.offsetHeight > list.scrollTop + list.clientHeight) {
        list.scrollTop = top - list.clientHeight / 3;
      }
    }
  };
  picker.addEventListener("change", () => { location.hash = picker.value; });
  addEventListener("hashchange", show);
  show();
})();
"""
