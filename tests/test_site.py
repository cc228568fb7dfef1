"""The built documentation: its search, its links, and that it needs no network.

The search runs in a headless browser with the files of the built site, which is what
``search.html`` runs.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.test_docs import ROOT

SITE = ROOT / "docs" / "_build" / "html"
FIRST = 4  # results that people look at
# What people search for, and the pages that answer it.
ANSWERS = {
    "GPU 2": ["how_to/choose_a_gpu"],
    "CUDA_VISIBLE_DEVICES": ["how_to/choose_a_gpu"],
    "which GPU": ["how_to/choose_a_gpu"],
    "wandb": ["how_to/logging"],
    "W&B": ["how_to/logging"],
    "resume": ["how_to/resume"],
    "save best model": ["how_to/save_best_model"],
    "mixed precision": ["how_to/mixed_precision"],
    "bf16": ["how_to/mixed_precision"],
    "warmup": ["how_to/lr_schedulers"],
    "warm-up": ["how_to/lr_schedulers"],
    "warm up": ["how_to/lr_schedulers"],
    "freeze layers": ["how_to/freeze_and_fine_tune"],
    "class weights": ["how_to/class_weights"],
    "weighted loss": ["how_to/class_weights", "how_to/custom_loss"],
    "custom metric": ["how_to/custom_metrics"],
    "custom loss": ["how_to/custom_loss"],
    "multi-GPU": ["how_to/multiple_gpus"],
    "multiple GPUs": ["how_to/multiple_gpus"],
    "DDP": ["how_to/multiple_gpus"],
    "gradient checkpointing": ["how_to/gradient_checkpointing"],
    "predict images folder": ["how_to/predict"],
    "inference": ["how_to/predict"],
    "ImageFolder": ["how_to/images_from_a_folder"],
    "hyperparameter search": ["how_to/hyperparameter_search"],
    "optuna": ["how_to/hyperparameter_search"],
    "ONNX": ["how_to/export"],
    "export": ["how_to/export"],
    "push_to_hub": ["how_to/export"],
    "hub": ["how_to/export"],
    "safetensors": ["how_to/export"],
    "save model": ["how_to/save_and_load"],
    "load model": ["how_to/save_and_load"],
    "load checkpoint": ["how_to/save_and_load"],
    "early stopping": ["how_to/early_stopping"],
    "accuracy": ["how_to/custom_metrics"],
    "learning rate": ["how_to/lr_schedulers"],
    "collate_fn": ["how_to/data_loading"],
    "num_workers": ["how_to/data_loading"],
    "dataloader": ["how_to/data_loading"],
    "seed": ["how_to/reproducibility"],
    "installation": ["start/installation"],
    "install": ["start/installation"],
    "notebook": ["how_to/notebooks"],
    "tutorial": ["start/tutorial_vision", "start/tutorial_text"],
    "torch.compile": ["how_to/torch_compile"],
    "logging": ["how_to/logging"],
    "validation": ["how_to/validation"],
    "confusion matrix": ["how_to/custom_metrics"],
    "checkpoint": ["how_to/save_and_load"],
    "tqdm": ["how_to/progress_bar", "plugins/builtins"],
    "progress bar": ["how_to/progress_bar", "plugins/builtins"],
    "gradient accumulation": ["how_to/gradient_accumulation"],
    "scheduler": ["how_to/lr_schedulers"],
    "callback": ["how_to/callbacks"],
    # Words that the pages don't use, but people do.
    "Apple silicon": ["how_to/choose_a_gpu"],
    "TPU": ["how_to/choose_a_gpu", "understand/distributed"],
    "k-fold": ["how_to/validation"],
    "subclass trainer": ["start/quickstart"],
    "plateau": ["how_to/lr_schedulers"],
    "max steps": ["start/quickstart"],
    "time limit": ["start/quickstart"],
    "verbose": ["how_to/progress_bar"],
    "quiet": ["how_to/progress_bar"],
    "checkpoint every n steps": ["how_to/resume"],
    "save every epoch": ["how_to/resume"],
    "huggingface dataset": ["how_to/data_loading"],
    "pin_memory": ["how_to/data_loading"],
    "transfer learning": ["how_to/freeze_and_fine_tune"],
    "regression": ["how_to/custom_metrics"],
    "quickstart": ["start/quickstart"],
    "example": ["start/quickstart"],
    "YAML": ["how_to/settings_for_one_run"],
    "config": ["reference/settings"],
    "CSV logger": ["how_to/logging"],
    "object detection": ["plugins/metrics"],
    "migrate": ["coming_from/hf_trainer"],
    "speed": ["reference/benchmarks"],
    # Sentences, of which no page has all words.
    "resume training from last checkpoint": ["how_to/resume"],
    "reduce learning rate on plateau": ["how_to/lr_schedulers"],
    "use two GPUs": ["how_to/multiple_gpus"],
    "limit GPU memory": ["how_to/gradient_checkpointing"],
    "CUDA out of memory": ["how_to/gradient_checkpointing"],
    # Questions that other trainers' users ask.
    "autoencoder": ["how_to/custom_loss"],
    "L1 regularization": ["how_to/custom_loss"],
    "multiple inputs": ["how_to/data_loading"],
    "model with two inputs": ["how_to/data_loading"],
    "disable shuffling": ["how_to/data_loading"],
    "bucketing": ["how_to/data_loading"],
    "combine datasets": ["how_to/data_loading"],
    "validate every n epochs": ["how_to/validation"],
    "save top k checkpoints": ["how_to/save_best_model"],
    "change learning rate during training": ["how_to/lr_schedulers"],
    "sample weights": ["how_to/class_weights"],
    "binary classification": ["how_to/class_weights"],
    "test time augmentation": ["how_to/predict"],
    "predict single image": ["how_to/predict"],
    "loss not decreasing": ["how_to/debugging"],
    "print model summary": ["how_to/debugging"],
    "plot loss curve": ["how_to/notebooks"],
    "freeze backbone": ["how_to/freeze_and_fine_tune"],
    "language model": ["plugins/transformers"],
    "sync batchnorm": ["how_to/multiple_gpus"],
    "progressive resizing": ["start/examples"],
    "KeyboardInterrupt": ["how_to/preemption"],
    # Misspelt words, and British ones.
    "checkpont": ["how_to/save_and_load"],
    "erly stoping": ["how_to/early_stopping"],
    "learning rate sheduler": ["how_to/lr_schedulers"],
    "hyperparmeter": ["how_to/hyperparameter_search"],
    "optimiser": ["how_to/multiple_optimizers"],
}
SCRIPTS = ["documentation_options", "doctools", "sphinx_highlight", "searchtools", "language_data"]
HARNESS = """
<html data-content_root="./"><body><pre></pre>{scripts}<script>
const found = {{}};
for (const query of {queries})
  found[query] = Search._performSearch(...Search._parseQuery(query)).reverse()
    .map(([page, title, anchor]) => [page, anchor, title]);
document.querySelector("pre").textContent = JSON.stringify(found);
</script></body></html>
"""


@pytest.fixture(scope="module")
def site() -> Path:
    """The site as `nox -s docs` builds it; built here if a file has changed since then."""
    folders = ("docs", "pa_core", "plugins", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    kinds = {".md", ".py", ".js", ".css", ".svg"}
    sources = [file for file in files if file.suffix in kinds and "_build" not in file.parts]
    last = SITE / "objects.inv"  # written at the end
    changed = max(file.stat().st_mtime for file in sources)
    if not last.exists() or last.stat().st_mtime < changed:
        shutil.rmtree(SITE.parent, ignore_errors=True)
        build = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(SITE)]
        built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
        if built.returncode:
            shutil.rmtree(SITE.parent, ignore_errors=True)
            pytest.fail(built.stderr)
    return SITE


def browse(url: str) -> str:
    """The page as it is after its scripts have run."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("there is no Chromium to run the search in")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command = [browser, *options, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def results(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """For each query: page, anchor and title of all results."""
    files = [*(site / "_static" / f"{name}.js" for name in SCRIPTS), site / "searchindex.js"]
    scripts = "".join(f'<script src="{file.as_uri()}"></script>' for file in files)
    page = tmp_path_factory.mktemp("search") / "page.html"
    page.write_text(HARNESS.format(scripts=scripts, queries=json.dumps(list(ANSWERS))))
    text = re.search("<pre>(.*?)</pre>", browse(page.as_uri()), re.DOTALL)
    assert text
    found: dict[str, list[list[str]]] = json.loads(html.unescape(text[1]))
    return found


# -- Search ---------------------------------------------------------------------------------------


def test_a_search_finds_the_page_with_the_answer_first(
    results: dict[str, list[list[str]]],
) -> None:
    shown = {query: [page for page, *_ in results[query][:FIRST]] for query in ANSWERS}
    missed = {query: pages for query, pages in shown.items() if not {*pages} & {*ANSWERS[query]}}
    assert not missed


def test_the_page_of_results_shows_the_same_with_summaries(
    site: Path, results: dict[str, list[list[str]]]
) -> None:
    text = browse(f"{(site / 'search.html').as_uri()}?q=save+best+model")
    item = r'<li class="kind-\w+"><a href="([^"#]+)\.html([^"]*)".*?>([^<]+)</a>(.*?)</li>'
    shown = re.findall(item, text)
    found = [[page, anchor, html.unescape(title)] for page, anchor, title, _ in shown[:FIRST]]
    assert found == results["save best model"][:FIRST]
    assert all('<p class="context">' in rest for *_, rest in shown[:FIRST])


# -- Links ----------------------------------------------------------------------------------------


@cache
def pages() -> dict[Path, str]:
    return {file: file.read_text() for file in SITE.rglob("*.html")}


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    anchors = {page: {*re.findall(r'\bid="([^"]+)"', text)} for page, text in pages().items()}
    broken = set()
    for page, text in pages().items():
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            path, _, anchor = unquote(html.unescape(link)).partition("#")
            if re.match(r"\w+:", path):
                continue
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            is_found = target.exists() and (not anchor or anchor in anchors.get(target, {anchor}))
            if not is_found:
                broken.add(f"{page.relative_to(site)}: {link}")
    assert not broken


def test_every_page_has_a_previous_or_a_next_one(site: Path) -> None:
    docs = ROOT / "docs"
    for source in docs.rglob("*.md"):
        text = pages()[site / source.relative_to(docs).with_suffix(".html")]
        assert re.search(r'<link rel="(?:next|prev)"', text), source


def test_source_links_open_highlighted_source(site: Path) -> None:
    assert not (site / "_downloads").exists()
    text = (site / "understand" / "inside.html").read_text()
    links = re.findall(r'href="\.\./(_modules/pa_core/trainer\.html)#(L-\d+)"', text)
    assert links
    for path, line in links:
        source = (site / path).read_text()
        assert f'<span id="{line}">' in source
        assert 'class="highlight"' in source
    api = (site / "reference" / "api" / "trainer.html").read_text()
    assert 'href="../../_modules/pa_core/trainer.html#L-' in api


# -- Files ----------------------------------------------------------------------------------------


def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    loading = re.compile(r"<(?!a\b)\w+\b[^>]*\b(?:src|href|data|poster)=\"(?:https?:)?//[^\"]*\"")
    in_style = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//")
    for page, text in pages().items():
        assert not loading.findall(text), page
    for file in site.rglob("*.css"):
        assert not in_style.findall(file.read_text()), file


def test_code_has_buttons_to_copy_it(site: Path) -> None:
    for page in ("index", "start/quickstart", "how_to/mixed_precision"):
        assert "copybutton.js" in (site / f"{page}.html").read_text()


def test_a_page_of_the_api_begins_with_a_table_of_its_names(site: Path) -> None:
    found = sorted((site / "reference" / "api").glob("*.html"))
    assert found
    for page in found:
        text = page.read_text()
        table = text.index('class="names')
        assert table < text.index('<dl class="py'), page
        rows = re.findall(r"<tr.*?</tr>", text[table : text.index("</table>", table)], re.DOTALL)
        for row in rows:
            assert re.search(r'href="#[\w.]+"', row), page
            assert re.search(r"<p>(?:(?!<a ).)+?\w", row.partition("</td>")[2]), f"{page}: {row}"
