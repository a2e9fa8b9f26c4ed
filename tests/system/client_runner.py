"""Runs snippets of docs/clients.md, in the clients' environment: jobs as JSON on stdin, outcomes on stdout.

A job is `{"code": […], "given": {…}}`: the parts run one after another, and after the first the names in `given`
are set.
"""

import contextlib
import io
import json
import os
import sys
import time

# litellm would fetch its list of prices; haystack and others would tell their makers of being used.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HAYSTACK_TELEMETRY_ENABLED": "False"}


def run(job: dict) -> dict:
    printed, names, began = io.StringIO(), {}, time.monotonic()
    outcome = {"error": None, "message": ""}
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            for part in job["code"]:
                exec(compile(part, "docs/clients.md", "exec"), names)
                names.update(job["given"])
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    return {**outcome, "printed": printed.getvalue(), "took_s": time.monotonic() - began}


if __name__ == "__main__":
    json.dump([run(job) for job in json.load(sys.stdin)], sys.stdout)
