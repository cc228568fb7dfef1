"""Pages of many kinds in a browser: nothing overflows, is cut or overlaps; hovering works."""

from __future__ import annotations

import base64
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pa_report.charts import charts_of
from pa_report.comparison_page import comparison_page
from pa_report.images import Picture
from pa_report.palette import DARK, LIGHT, style_of
from pa_report.run import Point, Run
from pa_report.run_page import run_page

UPDATES = 45  # per epoch


def points(epochs: int, value: Any, updates: int = UPDATES) -> list[Point]:
    return [
        Point(n, n * updates, n * updates * 32, n * 2.0, value(n)) for n in range(1, epochs + 1)
    ]


def falling(n: int) -> float:
    return 2.3 / n**1.5 + 0.003


def a_run(name: str = "run", epochs: int = 12, updates: int = UPDATES, **fields: Any) -> Run:
    """A run with two losses, a learning rate and everything that its summary shows."""
    metrics = {
        "train_loss_epoch": points(epochs, falling, updates),
        "eval_loss_epoch": points(epochs, lambda n: falling(n) * 1.1 + 0.01 * n % 3, updates),
    }
    rates = [
        Point(1 + n // updates, n + 1, n * 32, n * 0.01, 0.01 * (1 + math.cos(n / 200)))
        for n in range(0, epochs * updates, max(1, epochs * updates // 300))
    ]
    layers = {f"Linear(in_features={n}, out_features=10, bias=True)": 1 for n in range(20)}
    defaults = {
        "status": "finished",
        "started": "2026-05-04 10:20:30",
        "progress": {
            "epochs": epochs, "updates": epochs * updates, "samples": epochs * 1437,
            "seconds": epochs * 2.5,
        },
        "metrics": metrics,
        "measures": {"learning_rate": rates},
        "times": {"training": epochs * 2.0, "evaluation": epochs * 0.4},
        "manifest": {
            "seed": 42,
            "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
            "packages": {"python": "3.11.7", "torch": "2.14.1", "pa-core": "0.1.0"},
            "hardware": {"device": "cuda", "name": "NVIDIA A100-SXM4-80GB"},
            "run": {
                "num_processes": 2, "per_device_batch_size": 8, "gradient_accumulation_steps": 2,
                "mixed_precision": "bf16", "dataset_length": 1437, "model": "DigitNet",
                "dataset": {"type": "TensorDataset"}, "loss": {"class": "CrossEntropyLoss"},
                "optimizer": "AdamW", "optimizer_settings": [{"lr": 0.001, "weight_decay": 0.01}],
                "layers": layers,
            },
            "plugins": {
                "a_plugin_with_a_long_name": {
                    "distribution": "pa-plugin", "version": "1.2.3",
                    "settings": {f"setting_{n}": "x" * 30 for n in range(6)},
                }
            },
        },
        "facts": {
            "parameters": 9_962_123, "trainable_parameters": 1234, "eval_samples": {"": 360},
            "command": "python train.py --learning-rate 0.001 --data /data/sets/digits/of/2026",
        },
    }  # fmt: skip
    return Run(name, **(defaults | fields))


def with_metrics(run: Run, **metrics: list[Point]) -> Run:
    return Run(**{**vars(run), "metrics": {**run.metrics, **metrics}})


TWELVE = ("accuracy", "top3", "f1_score", "precision", "recall", "specificity", "auroc",
          "cohen_kappa", "matthews_corr_coef", "calibration_error", "hamming_distance",
          "mean_average_precision_at_0.5")  # fmt: skip


def matrix(size: int, diagonal: int) -> list[list[float]]:
    return [[diagonal if r == c else r * c % 7 for c in range(size)] for r in range(size)]


def lists(length: int, name: str = "recall") -> dict[str, list[Point]]:
    return {
        f"{name}/{c}": points(9, lambda n, c=c: math.nan if n == c == 3 else 1 - 1 / (n + c))
        for c in range(length)
    }


def kinds() -> dict[str, str]:
    """Pages by the name of their kind."""
    picture = '<svg xmlns="http://www.w3.org/2000/svg" width="600" height="500"/>'
    svg = f"data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}"
    long = "a_metric_with_a_very_long_name_that_nobody_would_read_aloud_but_somebody_wrote"
    gaps = with_metrics(
        a_run(),
        eval_ratio=points(12, lambda n: math.nan if 4 <= n <= 6 else 1e-7 * n),
        perplexity=points(12, lambda n: math.inf if n < 3 else 1e7 / n**4),
        always_nan=points(12, lambda n: math.nan),
    )
    twelve = {
        f"{prefix}{name}": points(8, lambda n: 1 - 1 / (n + 1))
        for prefix in ("train_", "day_eval_", "night_eval_")
        for name in TWELVE
    }
    decades = [Point(1 + n // 45, n + 1, n, n, 10 ** (-8 + n / 40)) for n in range(360)]
    long_run = a_run(
        "A title of forty words " * 8, status="failed", reason=f"OSError: /{'folder/' * 60}\nlines",
        metrics={f"train_{long}": points(5, falling), f"eval_{long}": points(5, falling)},
    )  # fmt: skip
    twenty = [
        with_metrics(
            a_run(f"lr{10.0 ** -(n % 4):g}-width{n}-batch{32 + n}", 6 + n % 3, 45 - n % 2),
            eval_accuracy=points(6, lambda e, n=n: 1 - 1 / (e + n), 45 - n % 2),
        )
        for n in range(20)
    ]
    pages = {
        "plain": a_run(),
        "one epoch": with_metrics(a_run(epochs=1), accuracy=points(1, lambda n: 0.5)),
        "500 epochs": a_run(epochs=500, updates=20_000),
        "gaps": gaps,
        "12 metrics": with_metrics(a_run(epochs=8), **twelve),
        "lists": with_metrics(a_run(epochs=9), **lists(6, "train_f1"), **lists(10)),
        "long lists": with_metrics(a_run(epochs=9), **lists(150)),
        "decades": a_run(epochs=8, measures={"learning_rate": decades}),
        "long names": long_run,
        "matrices": a_run(matrices={f"confusion_{n}": matrix(n, 98_765) for n in (3, 10, 20, 60)}),
        "nothing": Run("nothing"),
    }
    built = {name: run_page(run) for name, run in pages.items()}
    pictures = [Picture("digits", 540, [svg] * 16), Picture("figure", 540, [svg])]
    built["pictures"] = run_page(a_run(), pictures)
    other = a_run("other", 9, status="interrupted", facts={"command": "python train.py"})
    built["two runs"] = comparison_page([a_run("first"), other], "Two runs")
    built["20 runs"] = comparison_page(twenty, "Comparison of runs")
    many = [
        with_metrics(a_run(f"run {n} with a name of some length"), **lists(12)) for n in range(30)
    ]
    built["30 runs"] = comparison_page(many, "Comparison of runs")
    return built


# What is wrong with a page: texts that overflow, leave their card, or overlap; curves outside.
LOOK = """() => {
  const found = [];
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push(`page: ${root.scrollWidth} > ${root.clientWidth}`);
  const shown = (one) => one.getClientRects().length && one.offsetParent !== null;
  const all = (scope, selector) => [...scope.querySelectorAll(selector)].filter(shown);
  const box = (one) => one.getBoundingClientRect();
  const name = (one) => `${one.tagName}.${one.className} ${one.textContent.slice(0, 40)}`;
  for (const one of all(document, "h1,h2,h3,p,li,dd,dt,td,th,summary,.xs span,.ys span,.name"))
    if (one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== "inline")
      found.push(`cut: ${name(one)}: ${one.scrollWidth} > ${one.clientWidth}`);
  for (const card of all(document, "figure,.card,.tiles>div")) {
    const outer = box(card);
    for (const one of all(card, "h3,p,li,dd,dt,td,th,.xs span,.ys span,.name,img")) {
      const inner = box(one), scroll = one.closest(".scroll");
      if (scroll && scroll.scrollWidth > scroll.clientWidth) continue;
      if (inner.left < outer.left - .5 || inner.right > outer.right + .5
          || inner.top < outer.top - .5 || inner.bottom > outer.bottom + .5)
        found.push(`outside: ${name(one)}`);
    }
  }
  for (const one of all(document, ".scroll"))
    if (one.scrollWidth > one.clientWidth + 1 && (root.clientWidth > 1000 || !one.querySelector(".matrix")))
      found.push(`scrolls: ${name(one)}`);
  const apart = (group, what) => {
    const boxes = group.map((one) => [one, box(one)]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > .5
          && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 2.5)
        found.push(`overlap: ${what}: ${name(a)} / ${name(b)}`);
    }));
  };
  for (const plot of all(document, ".plot")) {
    apart(all(plot, ".ys span,.xs span,.name"), "labels");
    const area = box(plot.querySelector(".area"));
    for (const line of plot.querySelectorAll(".line,.mark,.cells,.ring")) {
      const drawn = line.getBBox();
      if (drawn.x < -.1 || drawn.y < -.1 || drawn.x + drawn.width > 1000.1 || drawn.y + drawn.height > 1000.1)
        found.push(`outside the plot: ${line.getAttribute("d").slice(0, 60)}`);
    }
    for (const label of all(plot, ".ys span"))
      if (box(label).right > area.left) found.push(`in the plot: ${name(label)}`);
  }
  for (const legend of all(document, ".legend")) apart(all(legend, "li"), "legend");
  return found;
}"""  # noqa: E501


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium to look at pages with")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    files = {}
    for name, page in kinds().items():
        files[name] = folder / f"{name}.html"
        files[name].write_text(page, encoding="utf-8")
    return files


@pytest.mark.parametrize(
    ("width", "media", "scheme"),
    [(1200, "screen", "light"), (390, "screen", "dark"), (760, "print", "dark")],
)
def test_nothing_overflows_is_cut_or_overlaps(browser, pages, width, media, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.emulate_media(media=media)
    errors: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    found = {}
    for name, file in pages.items():
        page.goto(file.as_uri())
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        found[name] = page.evaluate(LOOK)[:8]
    page.close()
    assert {name: problems for name, problems in found.items() if problems} == {}
    assert errors == []
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize(
    "names",
    [
        ["accuracy", "ema_eval_accuracy"],
        ["ema_eval_loss_epoch", "ratio", "ema_ratio"],
        ["day_eval_accuracy", "accuracy"],
        ["ema_eval_loss_epoch", "accuracy", "train_accuracy"],
    ],
)
def test_a_curve_beside_another_has_a_name_of_its_own(names):
    values = points(4, falling)
    charts = charts_of(a_run(metrics=dict.fromkeys(["train_loss_epoch", *names], values)))
    (labels,) = [
        [curve.label for curve in chart.curves]
        for chart in charts
        if chart.title in ("accuracy", "ratio")
    ]
    assert len(set(labels)) == len(labels) == 2
    assert "eval" in labels


def test_hovering_shows_the_values_of_the_run(browser, pages):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(pages["gaps"].as_uri())
    area = page.locator(".area").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    run = a_run()
    for number in (0, 6, 11):
        at = box["x"] + 1 + (box["width"] - 2) * number / 11
        page.mouse.move(at, box["y"] + box["height"] / 2)
        shown = page.locator(".tip").inner_text().split()
        assert shown[:4] == ["epoch", f"{number + 1},", "update", str((number + 1) * UPDATES)]
        values = dict(zip(shown[4::2], map(float, shown[5::2]), strict=True))
        assert values == {
            split: pytest.approx(run.metrics[f"{split}_loss_epoch"][number].value, rel=1e-3)
            for split in ("train", "eval")
        }
    page.mouse.move(0, 0)
    assert page.locator(".tip").is_hidden()
    page.goto(pages["lists"].as_uri())
    area = page.locator(".area:has(.heat)")
    area.scroll_into_view_if_needed()
    area.hover(position={"x": 3, "y": 3})
    # the first epoch of the first class
    assert page.locator(".tip").inner_text().split() == ["epoch", "1,", "update", "45", "0", "0"]
    page.close()


def test_without_javascript_everything_is_on_the_page(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["20 runs"].as_uri())
    assert page.locator(".by-epoch .curve").first.is_visible()
    assert page.locator(".by-update .curve").first.is_hidden()
    page.locator("#by-update").check()  # by the style sheet alone
    assert page.locator(".by-update .curve").first.is_visible()
    page.locator("summary").first.click()
    assert page.get_by_text("run.layers").is_hidden()  # the same in all runs
    assert page.locator("details[open] td").first.is_visible()
    context.close()


# -- Colours --------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
VISION = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Oklab: https://bottosson.github.io/posts/oklab/
TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_OKLAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear(colour: str) -> list[float]:
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def product(rows: list[list[float]], vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in rows]


def oklab(colour: str, vision: str) -> list[float]:
    seen = [min(1.0, max(0.0, c)) for c in product(VISION[vision], linear(colour))]
    return [100 * c for c in product(TO_OKLAB, [c ** (1 / 3) for c in product(TO_CONES, seen)])]


def luminance(colour: str) -> float:
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


@pytest.mark.parametrize(("theme", "card"), [(LIGHT, "#ffffff"), (DARK, "#1d2026")])
def test_colours_differ_for_colour_blind_people_and_from_the_page(theme, card):
    for vision in VISION:
        seen = {colour: oklab(colour, vision) for colour in theme}
        distances = {(a, b): math.dist(seen[a], seen[b]) for a in theme for b in theme if a < b}
        # A difference of 2 is just noticeable.
        closest = min(distances, key=distances.get)
        assert distances[closest] >= 10, f"{vision}: {closest}"
    for colour in theme:
        bright, dark = sorted((luminance(colour), luminance(card)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 3, colour


def test_24_curves_have_different_colours_or_dashes():
    assert len({style_of(number) for number in range(24)}) == 24
    assert {style_of(number)[1] for number in range(6)} == {0}
