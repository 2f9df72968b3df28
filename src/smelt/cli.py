"""The command line: run, check, bench, search, verify, methods, report, export, rank, serve, env.

Nothing heavy is imported until a command needs it. An error is one line on stderr and exit code 2; `--debug` shows
the traceback. Ctrl-C leaves a run that the same command continues.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from smelt.spec import FAMILIES, SmeltError, nearest

app = typer.Typer(
    name="smelt",
    help="Shrink a language model, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: seed=1, train.tokens=1000, stages.0.cache=...")
]
Folder = Annotated[Path, typer.Option("--folder", help="Where run folders are kept.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="'embedded', a folder or a hub id, instead of the recipe's.")]
DataOption = Annotated[str | None, typer.Option("--data", help="Your text: 'my/*.txt', a .jsonl or .parquet, a datasets name.")]
Pickle = Annotated[bool, typer.Option("--trust-pickle", help="Allow pickled weights, which can run code when read.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a model to bring code of its own.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Shrink a language model, and prove it."""


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; the default one when left out.")] = None,
    model: ModelOption = None,
    data: DataOption = None,
    set_: Set = None,
    folder: Folder = Path("runs"),
    trust_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Run a recipe: a smaller model, and a page that shows what every step gained and lost."""
    from smelt.recipe import recipe_of, shipped

    found = recipe_of(recipe or shipped("recipes") / "quickstart.yaml", model, data, _pairs(set_))

    from smelt import pipeline, report  # after the recipe is read: its mistakes are said at once, torch takes seconds to import
    from smelt.progress import clock, note

    results = pipeline.run(found, folder=folder, trust_pickle=trust_pickle, trust_remote_code=trust_remote_code)
    if not results:  # a helper process under torchrun
        return
    root = folder / results["name"]
    _show(report.table(results, root / "report.html"))
    for row in results["expect"]:
        note(f"{'held' if row['held'] else 'NOT held'}: {row['text']}   ({row['left']:.4g} against {row['right']:.4g})")
    note(f"Model: {root / 'model'}" if (root / "model").is_dir() else "no new checkpoint: this recipe only binds runtime methods")
    note(f"done in {clock(results['seconds'])}; stages reused: {sum(s['reused'] for s in results['stages'])} of {len(results['stages'])}")


@app.command()
def check(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; the default one when left out.")] = None,
    model: ModelOption = None,
    data: DataOption = None,
    set_: Set = None,
    folder: Folder = Path("runs"),
    trust_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Preflight: names, files, vocabularies, what fits together, memory, disk and time. Reads no weights."""
    from smelt.recipe import recipe_of, shipped

    found = recipe_of(recipe or shipped("recipes") / "quickstart.yaml", model, data, _pairs(set_))

    from smelt import preflight

    trust = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
    for line in preflight.check(found, folder / found.name, trust):
        typer.echo(line)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="'embedded', a folder or a hub id.")],
    variants: Annotated[
        list[str] | None, typer.Argument(metavar="FAMILY=METHODS...", help="cache='[none, kivi(bits=2)]' decode=...")
    ] = None,
    evaluate: Annotated[str, typer.Option("--evaluate", help="Probes to measure.")] = "[perplexity, latency, memory]",
    data: DataOption = None,
    folder: Folder = Path("runs"),
    trust_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Measure runtime methods of one model in turns, as ratios with intervals."""
    from smelt import pipeline, report

    if model.partition("=")[0] in FAMILIES and not Path(model).exists():
        raise SmeltError(f'bench: the model comes first: smelt bench embedded "{model}"')
    results, root = pipeline.bench(
        model,
        _pairs(variants),
        evaluate,
        data=data,
        folder=folder,
        trust_pickle=trust_pickle,
        trust_remote_code=trust_remote_code,
    )
    _show(report.table(results, root / "report.html"))


@app.command()
def search(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe with lists to choose from; an example when left out.")] = None,
    budget: Annotated[str, typer.Option("--budget", metavar="TERMS", help="Ratios to the base: 'memory<=0.5,quality>=0.97'.")] = "",
    minimize: Annotated[str | None, typer.Option("--minimize", metavar="TERM", help="What counts within the budget.")] = None,
    maximize: Annotated[str | None, typer.Option("--maximize", metavar="TERM", help="The same; quality when neither is said.")] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Measure at most so many paths.")] = 64,
    model: ModelOption = None,
    data: DataOption = None,
    set_: Set = None,
    folder: Folder = Path("runs"),
    trust_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Find the best path through a recipe's lists within a budget. Exit code 1 when no path keeps to it."""
    from smelt.recipe import recipe_of, shipped

    found = recipe_of(recipe or shipped("recipes") / "search.yaml", model, data, _pairs(set_))

    from smelt import report
    from smelt.search import search as find

    results, root = find(
        found,
        budget,
        minimize=minimize,
        maximize=maximize,
        most=most,
        folder=folder,
        trust_pickle=trust_pickle,
        trust_remote_code=trust_remote_code,
    )
    _show(report.front(results, root / "report.html"))
    if not results["search"]["feasible"]:
        raise typer.Exit(1)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="A method, such as kivi or cache.kivi.")],
    set_: Set = None,
    folder: Folder = Path("runs"),
    ledger: Annotated[Path | None, typer.Option("--ledger", help="Where the outcome is appended (claims/ledger.jsonl).")] = None,
) -> None:
    """Measure the claim of a method again and write the outcome into the ledger. Exit code 1 when it does not hold."""
    from smelt.recipe import claim

    changes = _pairs(set_)
    found = claim(name, changes)

    from smelt import pipeline, report
    from smelt.progress import note

    results, entry, written = pipeline.verify(found, changes, folder, ledger)
    _show(report.table(results))
    for row in results["expect"]:
        note(f"{'held' if row['held'] else 'NOT held'}: {row['text']}   ({row['left']:.4g} against {row['right']:.4g})")
    note(f"ledger  {written}")
    if not entry["held"]:
        raise typer.Exit(1)


@app.command()
def methods(
    family: Annotated[str | None, typer.Argument(help="One family, or one method as family.name.")] = None,
    write: Annotated[Path | None, typer.Option("--write", help="Write the page docs/methods.md.")] = None,
) -> None:
    """List every method with its rule, paper and parameters."""
    from smelt import registry

    owner, _, name = (family or "").partition(".")
    if owner and owner not in FAMILIES:
        place = [f"{f}.{owner}" for f in FAMILIES if owner in registry.names(f)]
        if not place:
            known = [*FAMILIES, *(n for f in FAMILIES for n in registry.names(f))]
            raise SmeltError(f"no family or method '{owner}'{nearest(owner, known)}")
        owner, _, name = place[0].partition(".")
    if write is not None:
        from smelt.report import methods_page

        rows = [registry.about(f, n) for f in FAMILIES for n in registry.names(f)]
        write.write_text(methods_page(rows, _ledger()), encoding="utf-8")
        typer.echo(f"wrote {write}: {len(rows)} methods")
        return
    if name:
        about = registry.about(owner, name)
        paper = f"{about.title}, {about.link}" + (f", {about.where}" if about.where else "")
        fields = ", ".join(f"{field}={default}" if default else field for field, default in about.fields)
        typer.echo(f"{owner}: {name}({fields})\n\n{about.docstring}\n\nPaper: {paper}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("family", "method", "rule", "paper"):
        table.add_column(title, overflow="fold" if title == "rule" else "ellipsis", no_wrap=title != "rule")
    for one in [owner] if owner else FAMILIES:
        for method in registry.names(one):
            about = registry.about(one, method)
            table.add_row(one, method, about.summary, about.link.replace("https://", ""))
    Console(highlight=False, markup=False).print(table)


def _ledger() -> list[dict]:
    import json

    from smelt.recipe import shipped

    file = shipped("claims") / "ledger.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart.")]) -> None:
    """Write the page of a finished run again and print its table."""
    import json

    from smelt import report as pages

    file = run_folder / "results.json"
    if not file.is_file():
        raise SmeltError("there is no finished run here (results.json is missing)", file=str(run_folder))
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        page = pages.html(results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SmeltError(f"not the results of a run: {error}", file=str(file)) from error
    (run_folder / "report.html").write_text(page, encoding="utf-8")
    _show(pages.table(results, run_folder / "report.html"))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="'embedded', a folder such as runs/quickstart/model, or a hub id.")],
    path: Annotated[Path, typer.Argument(help="The file to write, such as model.gguf.")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the matrices: f32, f16, bf16, q8_0. Quantized ones keep their codes.")
    ] = "f16",
) -> None:
    """Write a llama-like model as one GGUF file, for llama.cpp and the like."""
    from smelt.export import export as write
    from smelt.progress import note

    done = write(model, path, dtype)
    types = ", ".join(f"{count} {kind}" for kind, count in done.types.items())
    for line in done.notes:
        note(line)
    typer.echo(f"wrote {done.path}: {done.bytes / 1e6:.1f} MB, {done.parameters / 1e6:.2f} M parameters ({types})")


@app.command()
def rank(
    queries: Annotated[Path, typer.Option("--queries", help="Lines id<TAB>text, or BEIR's .jsonl.")],
    corpus: Annotated[Path, typer.Option("--corpus", help="BEIR's .jsonl, or lines id<TAB>text.")],
    out: Annotated[Path, typer.Option("--run", help="The run to write: TREC's format, or .jsonl.")],
    model: Annotated[str | None, typer.Option("--model", help="'embedded', a folder or a hub id; bm25() needs none.")] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="METHOD", help="Such as 'sliding_window(judge=first_token())'; else what suits the model."),
    ] = None,
    first: Annotated[
        str | None, typer.Option("--first", metavar="METHOD", help="The retriever that finds the candidates; bm25() when left out.")
    ] = None,
    candidates: Annotated[Path | None, typer.Option("--candidates", help="A TREC run with the candidates instead.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Candidates of a query.")] = 100,
    qrels: Annotated[Path | None, typer.Option("--qrels", help="Judgements (TREC or BEIR) to measure the orders by.")] = None,
    relevant: Annotated[int, typer.Option("--relevant", min=1, help="Lowest grade that RR and Recall count; 2 for TREC DL.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Queries asked at once.")] = 8,
    tag: Annotated[str | None, typer.Option("--tag", help="Last column of the run; the method's name when left out.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask everything anew, whatever a run that was stopped had done.")] = False,
    trust_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Order passages for queries: search a corpus, rerank candidates, measure against judgements."""
    from smelt import ranking

    outcome = ranking.rank_files(
        queries,
        corpus,
        out,
        model=model,
        method=method,
        first=first,
        candidates=candidates,
        qrels=qrels,
        top=top,
        batch=batch,
        relevant=relevant,
        tag=tag,
        fresh=fresh,
        trust_pickle=trust_pickle,
        trust_remote_code=trust_remote_code,
    )
    _show(ranking.table(outcome))


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="'embedded', a folder or a hub id.")],
    cache: Annotated[str | None, typer.Option("--cache", metavar="METHOD", help="Such as 'kivi(bits=2)'.")] = None,
    attention: Annotated[str | None, typer.Option("--attention", metavar="METHOD")] = None,
    decode: Annotated[str | None, typer.Option("--decode", metavar="METHOD", help="Such as 'prompt_lookup()'.")] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", metavar="METHOD", help="Judge or strategy of /v1/rerank; else what suits the model.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="What requests call the model.")] = None,
    token_file: Annotated[Path | None, typer.Option("--token-file", help="Bearer token; or the variable SMELT_TOKEN.")] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests that may wait; more get 429.")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Requests in one call of the model.")] = 16,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds per request, waiting included.")] = 120.0,
    body_limit: Annotated[int, typer.Option("--body-limit", min=1, help="Bytes of a request's body.")] = 1 << 20,
    stop_limit: Annotated[float, typer.Option("--stop-limit", min=0.0, help="Seconds for running requests after SIGTERM.")] = 30.0,
    trust_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Serve a model with runtime methods bound: OpenAI's chat completions, completions, embeddings and models, and rerank."""
    try:
        from smelt import serve as server
    except ImportError as error:
        raise SmeltError(f"smelt serve needs {error.name}: pip install 'smelt[serve]'") from error
    server.serve(
        model,
        cache=cache,
        attention=attention,
        decode=decode,
        rank=rank,
        name=name,
        host=host,
        port=port,
        token_file=token_file,
        limits=server.Limits(queue, batch, time_limit, body_limit, stop_limit),
        trust_pickle=trust_pickle,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def env() -> None:
    """Versions and machine, for a bug report."""
    from smelt._pipeline_machine import git_hash, machine, versions

    for key, value in {**versions(), **machine(), "git": git_hash()}.items():
        typer.echo(f"{key:<14}{value}")


def _pairs(given: list[str] | None) -> dict[str, str]:
    pairs = {}
    for item in given or []:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise SmeltError(f"'{item}' is not of the form key=value")
        pairs[key] = value
    return pairs


def _show(table: object) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)


def main() -> None:
    debug = "--debug" in sys.argv
    if debug:
        sys.argv = [sys.argv[0], "--debug", *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        app()
    except SmeltError as error:
        if debug:
            raise
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from here\n")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        first = str(error).strip().split("\n")[0][:300]
        sys.stderr.write(f"internal error: {type(error).__name__}: {first} (--debug shows where)\n")
        sys.exit(1)
