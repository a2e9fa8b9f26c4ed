"""`serve-app …`: thin, every command calls one function of the room that does the work."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from serve_app import __version__
from serve_app.access import API_KEY, bearer, is_elsewhere, shown, why_uncallable

_URL = os.environ.get("SERVE_APP_URL", "http://127.0.0.1:8000")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0 when it did what it says, 1 when it could not, 2 for a wrong command line or config."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python must not complain while it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve-app", description="Two-stage search as a Ray Serve fleet.")
    parser.add_argument("--version", action="version", version=f"serve-app {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="serve a config on this machine, in the foreground")
    up.add_argument("config", type=_path)
    up.add_argument("--port", type=_port, help="instead of the config's http_options.port")
    up.add_argument("--verbose", action="store_true", help="show the logs of Ray and of every replica")
    up.set_defaults(run=_up)

    down = commands.add_parser("down", help="stop what `up` serves on this machine")
    down.add_argument("--port", type=_port, help="where several are up")
    down.set_defaults(run=_down)

    drain = commands.add_parser(
        "drain", help="empty this machine's Ray node before it goes (RAY_ADDRESS names the head)"
    )
    drain.add_argument("--limit-s", type=_positive, default=480, help="(default: %(default)s)")
    drain.add_argument("--port", type=_port, default=8000, help="of the proxy (default: %(default)s)")
    drain.set_defaults(run=_drain)

    key = commands.add_parser("key", help="make an API key for the gateway's file of keys")
    key.add_argument("name", help="whose key it is")
    key.set_defaults(run=_key)

    check = commands.add_parser("check", help="validate a config without starting anything")
    check.add_argument("config", type=_path, nargs="+")
    check.set_defaults(run=_check)

    plan = commands.add_parser("plan", help="whether a config's models fit their shares of GPUs, without any GPU")
    plan.add_argument("config", type=_path)
    plan.add_argument("--gpu-memory", type=_gib, required=True, metavar="GIB", help="of one GPU, e.g. 80")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run=_plan)

    index = commands.add_parser("index", help="work on a recall index").add_subparsers(
        required=True, metavar="COMMAND"
    )
    build = index.add_parser("build", help="build an index from JSON Lines, CSV or a BEIR folder")
    build.add_argument(
        "--input", type=_path, required=True, help="FILE.jsonl, FILE.csv, or a folder with corpus.jsonl"
    )
    build.add_argument("--index", type=_path, required=True, help="the folder to make or replace")
    build.set_defaults(run=_index_build)

    search = commands.add_parser("search", help="search the catalogue through a running gateway")
    search.add_argument("query")
    search.add_argument("--top-n", type=int, default=10)
    search.set_defaults(run=_search)

    rerank = commands.add_parser("rerank", help="rerank lines of text through a running gateway")
    rerank.add_argument("query")
    rerank.add_argument(
        "documents", nargs="*", help="texts; read from standard input, one a line, when none is given"
    )
    rerank.add_argument("--top-n", type=int)
    rerank.set_defaults(run=_rerank)

    for command in (search, rerank):
        command.add_argument("--model", help="a route, pipeline or variant")
        command.add_argument("--instruction", help="what counts as relevant")
        command.add_argument("--timeout-ms", type=int)
        command.add_argument("--json", action="store_true", help="the answer as it came")

    evaluate = commands.add_parser("eval", help="measure a running gateway on a BEIR-layout folder")
    evaluate.add_argument("--dataset", type=_path, required=True, help="has queries.jsonl and qrels/test.tsv")
    evaluate.add_argument("--route", help="only the pipelines that get calls of this route")
    evaluate.add_argument("--model", action="append", help="only this pipeline or variant; may be repeated")
    evaluate.add_argument("--limit", type=int, help="only the first so many queries")
    evaluate.add_argument("--top-n", type=int, default=100, help="results to ask for (default: %(default)s)")
    evaluate.add_argument(
        "--ignore-identical-ids",
        action="store_true",
        help="leave out answers whose id is the query's, for datasets whose queries are documents too",
    )
    evaluate.add_argument("--concurrency", type=int, default=4)
    evaluate.add_argument("--timeout-s", type=float, default=30.0)
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(run=_eval)

    rollout = commands.add_parser(
        "rollout", help="move a route's traffic to another pipeline, watched"
    ).add_subparsers(required=True, metavar="COMMAND", dest="action")
    rollout_commands = {
        name: rollout.add_parser(name, help=help)
        for name, help in (
            ("start", "start a rollout from a document"),
            ("list", "the newest rollouts"),
            ("status", "where a rollout is, its guards and figures"),
            ("pause", "stay at the weight until resumed"),
            ("resume", "end a pause, or go on after an inconclusive analysis"),
            ("promote", "give the canary the whole route now"),
            ("abort", "give stable everything back"),
            ("undo", "take a promotion back"),
            ("history", "all changes of a rollout, with reasons"),
        )
    }
    for name, command in rollout_commands.items():
        if name == "start":
            command.add_argument("file", type=_path, help="a rollout document in YAML or JSON")
        else:
            command.add_argument("--route", help="only rollouts of this route")
        if name not in ("start", "list"):
            newest = "promoted" if name == "undo" else "unfinished"
            command.add_argument("id", nargs="?", help=f"a rollout (default: the newest {newest} one)")
        if name == "status":
            command.add_argument("--watch", action="store_true", help="until it is finished; 0 if it is promoted")
        command.add_argument("--json", action="store_true", help="the answer as it came")
        command.set_defaults(run=_rollout)

    simulate = commands.add_parser("simulate", help="run a scaling policy on a simulated fleet and traffic")
    simulate.add_argument(
        "--trace",
        default="flash-sale",
        help="constant, diurnal, flash-sale, bursty, all four, or FILE.csv with the columns seconds, calls_per_s, "
        "tokens_per_call and, if you like, pairs_per_call (default: %(default)s)",
    )
    simulate.add_argument(
        "--policy",
        default="all",
        help="drain-time, stock (Serve's own), fixed (the cheapest that meets the SLO), all, or "
        "package.module:Class (default: %(default)s)",
    )
    simulate.add_argument("--config", type=_path, help="take limits and settings from this Serve config")
    simulate.add_argument("--variant", help="of the config (default: its first)")
    simulate.add_argument("--scale", type=_positive, default=1.0, help="so many times the calls and max_replicas")
    simulate.add_argument("--tokens-per-s", type=_positive, help="of one busy replica")
    simulate.add_argument("--start-s", type=_positive, help="a replica's start on a free card, mostly loading")
    simulate.add_argument("--provision-s", type=_positive, help="until a new node can start replicas")
    simulate.add_argument("--gpus-per-node", type=int, help="cards of a node")
    simulate.add_argument("--slo-ms", type=_positive, help="latency target (default: 2000, or the deadline)")
    simulate.add_argument("--search", type=int, default=24, help="settings that are tried for Serve's own policy")
    simulate.add_argument("--seed", type=int, default=0, help="of the calls that are drawn")
    simulate.add_argument("--json", type=_path, metavar="FILE", help="write all numbers and curves")
    simulate.add_argument("--png", type=_path, metavar="FILE", help="draw them; with several traces, FILE-TRACE")
    simulate.set_defaults(run=_simulate)

    for command in (search, rerank, evaluate, *rollout_commands.values()):
        command.add_argument("--url", default=_URL, help="of the gateway (or SERVE_APP_URL)")
    return parser


def _up(arguments: argparse.Namespace) -> int:
    from serve_app.configfile import ConfigError, load
    from serve_app.launch import LaunchError, up

    try:
        config = load(arguments.config)
    except ConfigError as error:
        return _complain(error, 2)
    try:
        up(config, arguments.port, arguments.verbose)
    except LaunchError as error:
        return _complain(error, 1)
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from serve_app.launch import LaunchError, down

    try:
        stopped = down(arguments.port)
    except LaunchError as error:
        return _complain(error, 1)
    print(f"stopped what served on port {stopped}" if stopped else "nothing of ours is up")
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    from serve_app.drain import DrainError, drain

    try:
        drain(arguments.limit_s, arguments.port)
    except DrainError as error:
        return _complain(error, 1)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from serve_app.configfile import ConfigError, load

    failed = 0
    for path in arguments.config:
        try:
            load(path)
        except ConfigError as error:
            failed = _complain(f"{path}:\n{error}", 2)
        else:
            print(f"{path}: ok")
    return failed


def _key(arguments: argparse.Namespace) -> int:
    from serve_app.gateway.keys import KeysError, new_key

    try:
        key, line = new_key(arguments.name)
    except KeysError as error:
        return _complain(error, 2)
    print(f"for {arguments.name}: {key}", file=sys.stderr)
    print(line)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from serve_app.configfile import ConfigError, load
    from serve_app.plan import plan

    try:
        config = load(arguments.config)
    except ConfigError as error:
        return _complain(error, 2)
    made = plan(config, arguments.gpu_memory)
    print(made.json() if arguments.json else made.table())
    return 0 if made.fits else 1


def _index_build(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from serve_app.recall.builder import build_index
    from serve_app.recall.errors import RecallError

    with tqdm(unit="B", unit_scale=True, desc="index", disable=None, leave=False) as bar:

        def progress(read_bytes: int, all_bytes: int, documents: int) -> None:
            bar.total = all_bytes
            bar.set_postfix(documents=documents, refresh=False)
            bar.update(read_bytes - bar.n)

        try:
            made = build_index(arguments.input, arguments.index, progress=progress)
        except RecallError as error:
            bar.close()
            return _complain(error, 1)
    rate = made.documents / max(made.seconds, 1e-9)
    print(
        f"{arguments.index}: {made.documents} documents in {made.seconds:.1f} s ({rate:,.0f}/s), "
        f"{made.index_bytes / 1e6:.1f} MB"
    )
    if made.empty:
        print(f"{made.empty} of them have neither title nor text, so that no query finds them", file=sys.stderr)
    return 0


def _search(arguments: argparse.Namespace) -> int:
    body = {"query": arguments.query, "top_n": arguments.top_n, **_common(arguments)}
    answer = _post(arguments.url, "/v1/search", body)
    if answer is None:
        return 1
    if arguments.json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))
        return 0
    for result in answer["results"]:
        rerank = "     -" if result["rerank_score"] is None else f"{result['rerank_score']:6.3f}"
        title = result["title"] or result["text"][:80]
        print(
            f"{result['score']:6.3f}  bm25 {result['recall_score']:7.3f}  rerank {rerank}  {result['id']}  {title}"
        )
    _print_meta(answer["meta"])
    return 0


def _rerank(arguments: argparse.Namespace) -> int:
    try:
        documents = arguments.documents or _lines_of(sys.stdin.buffer)
    except ValueError as error:
        return _complain(error, 2)
    body = {"query": arguments.query, "documents": documents, **_common(arguments)}
    if arguments.top_n is not None:
        body["top_n"] = arguments.top_n
    answer = _post(arguments.url, "/v1/rerank", body)
    if answer is None:
        return 1
    if arguments.json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))
        return 0
    for result in answer["results"]:
        print(f"{result['relevance_score']:6.3f}  {documents[result['index']]}")
    _print_meta(answer["meta"])
    return 0


def _lines_of(file: BinaryIO) -> list[str]:
    """A document a line. Raises ValueError for one that is not UTF-8."""
    lines = []
    for number, line in enumerate(file, 1):
        try:
            lines.append(line.decode().rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input, line {number}: not UTF-8 ({error.reason})") from None
    return lines


def _eval(arguments: argparse.Namespace) -> int:
    from serve_app.evaluation import DatasetError, EvaluationError, evaluate

    try:
        report = evaluate(
            arguments.dataset,
            arguments.url,
            route=arguments.route,
            models=arguments.model,
            concurrency=arguments.concurrency,
            top_n=arguments.top_n,
            timeout_s=arguments.timeout_s,
            limit=arguments.limit,
            ignore_identical_ids=arguments.ignore_identical_ids,
        )
    except (DatasetError, EvaluationError) as error:
        return _complain(error, 1)
    print(json.dumps(report.json(), ensure_ascii=False, indent=2) if arguments.json else report.table())
    if report.stopped and report.stopped.is_interrupt:
        return 130
    return 1 if report.failures or report.stopped else 0


def _rollout(arguments: argparse.Namespace) -> int:
    from serve_app.rollout.client import CommandError
    from serve_app.rollout.command import run

    try:
        return run(arguments)
    except CommandError as error:
        return _complain(error, error.code)


def _simulate(arguments: argparse.Namespace) -> int:
    from serve_app.autoscaling.command import SimulationError, run

    try:
        run(arguments)
    except SimulationError as error:
        return _complain(error, 2)
    return 0


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in ("model", "instruction", "timeout_ms")}
    return {name: value for name, value in given.items() if value is not None}


def _print_meta(meta: dict[str, Any]) -> None:
    stages = ", ".join(f"{stage['name']} {stage['took_ms']:.1f} ms" for stage in meta["stages"])
    print(f"{meta['pipeline'] or 'variant'}: {stages}; in all {meta['took_ms']:.1f} ms", file=sys.stderr)
    for degraded in meta.get("degraded", ()):
        print(f"degraded ({degraded['reason']}): {degraded['detail']}", file=sys.stderr)


def _post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """The answer's body; None when there is none, after saying why."""
    import httpx

    where = shown(url)
    # The gateway's deadline decides, unless it is gone.
    limit_s = max(90.0, (body.get("timeout_ms") or 0) / 1e3 + 10)
    try:
        response = httpx.post(
            url.rstrip("/") + path,
            content=json.dumps(body).encode(),
            headers={**bearer(API_KEY), "Content-Type": "application/json"},
            timeout=httpx.Timeout(limit_s, connect=10),
            trust_env=is_elsewhere(url),
        )
    except httpx.ReadTimeout:
        _complain(f"no answer from {where} for {limit_s:g} s; --timeout-ms may ask for more than 80 s", 1)
        return None
    except httpx.HTTPError as error:
        _complain(f"no answer from {where}: {error}; is it up? (serve-app up CONFIG)", 1)
        return None
    # ImportError: a proxy of the environment for which httpx lacks something.
    except (httpx.InvalidURL, ValueError, ImportError) as error:
        _complain(f"can't call {where!r}: {why_uncallable(url, error)}", 1)
        return None
    try:
        answer = response.json()
    except ValueError:
        _complain(f"{where}{path} answered with something that is not JSON", 1)
        return None
    if response.is_error:
        message = answer.get("message", answer) if isinstance(answer, dict) else answer
        _complain(f"{response.status_code}: {message}", 1)
        return None
    if not isinstance(answer, dict) or not {"results", "meta"} <= answer.keys():
        _complain(f"{where}{path} answered with something else than results; is it serve-app's gateway?", 1)
        return None
    return answer


def _complain(message: object, code: int) -> int:
    print(f"serve-app: {message}", file=sys.stderr)
    return code


def _gib(text: str) -> float:
    try:
        if 1 <= (size := float(text)) <= 10_000:
            return size
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a GPU's memory in GiB (1 to 10000)")


def _path(text: str) -> Path:
    # What no shell has seen, as what make passes on, may have it still.
    return Path(text).expanduser()


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
