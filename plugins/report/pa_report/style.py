"""The style sheet of a page: system fonts, and a light and a dark theme that follow the system.

The curves' colours differ in lightness as well as in hue, so that people with a colour vision
deficiency can distinguish them. Each has a contrast of at least 3 to 1 against the page.
"""

CSS = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1a1d23;--soft:#555d6b;
--line:#e2e5ea;--axis:#9aa2af;--heat:0,94,160;--good:#0b6b47;--bad:#b3261e;
--c0:#0068a8;--c1:#d35400;--c2:#00875f;--c3:#8e3b8a;--c4:#7a6400;--c5:#b0306a;--c6:#3d7fd6;
--c7:#5c5c5c}
@media (prefers-color-scheme:dark){:root{--page:#14161a;--card:#1d2026;--ink:#e8eaee;
--soft:#a4acb9;--line:#31363f;--axis:#6b7482;--heat:86,180,233;--good:#5fd0a2;--bad:#ff8a80;
--c0:#56b4e9;--c1:#f39a53;--c2:#3fcf9d;--c3:#dc93d6;--c4:#dcc558;--c5:#f58fb4;--c6:#9db9ff;
--c7:#b5b5b5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:36px 0 12px}
h3{font-size:.95rem;font-weight:600;margin:0 0 8px;overflow-wrap:anywhere}
p{margin:0}
.note,.unit,caption{color:var(--soft);font-size:.87rem;font-weight:400}
.status{font-weight:600}.good{color:var(--good)}.bad{color:var(--bad)}
.reason{margin-top:10px;padding:8px 12px;border-left:3px solid var(--bad);background:var(--card);
overflow-wrap:anywhere;white-space:pre-wrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:12px;
margin:20px 0 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.tiles dt{color:var(--soft);font-size:.82rem;overflow-wrap:anywhere}
.tiles dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}
.pictures{align-items:start}.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px}
figure,.card{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px 16px;min-width:0}
figure img{max-width:100%;height:auto;background:#fff;border-radius:6px}
.strip{display:flex;flex-wrap:wrap;gap:6px}
.strip img{min-width:56px;image-rendering:pixelated}
svg{display:block;width:100%;height:auto}
svg text{font-size:12.5px;fill:var(--ink)}
svg .tick{fill:var(--soft);font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--line)}svg .axis{stroke:var(--axis)}
svg .line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
svg .lead{fill:none;stroke-width:1;opacity:.6}
svg .faint.line{stroke-width:1.2;opacity:.65}
svg .mark:hover{r:5px}
svg .cell{fill:rgba(var(--heat),calc(.04 + .96*var(--share)))}
svg.matrix text{font-size:inherit}
svg.matrix .strong{fill:var(--card)}
svg.matrix{margin:0 auto}
.scroll{overflow-x:auto}.card+h3,.card+p{margin-top:14px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}
tr:last-child td,tr:last-child th{border-bottom:0}
thead th{color:var(--soft);font-weight:600;border-bottom:1px solid var(--axis);white-space:nowrap}
tbody th{font-weight:400}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.number:last-child,th.number:last-child{padding-right:0}
.first td,.first th{border-top:1px solid var(--axis)}
.best{font-weight:700}
.settings th{color:var(--soft);width:42%}
.key{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:7px}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.86em}
footer{margin-top:40px;color:var(--soft);font-size:.85rem}
@media (max-width:520px){main{padding:20px 12px 36px}h1{font-size:1.4rem}
figure,.card{padding:12px 10px}svg text{font-size:13.5px}svg .mark{display:none}
th,td{padding-right:10px}.values tr>:nth-child(n+5){display:none}}
@media print{body{background:#fff}figure,.card{break-inside:avoid}}
""" + "".join(
    f"svg .c{number}{{stroke:var(--c{number})}}"
    f"svg .mark.c{number},svg .dot.c{number},.key.c{number}"
    f"{{fill:var(--c{number});background:var(--c{number})}}"
    for number in range(8)
)
