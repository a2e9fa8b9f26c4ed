"""Which replica of a variant gets a chunk: the one that has seen its query before, unless another has less to do.

Runs in the callers' processes. A replica that scored a query has the query's tokens in its prefix cache: a call
with other documents pays for the documents only. That is worth no waiting, so among replicas with equally many
chunks the known one is taken, and otherwise the less loaded.
"""

import random
from collections.abc import Sequence
from hashlib import blake2b

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serve_app.reranker.messages import ScoreRequest


# Without FIFOMixin sibling calls of one HTTP request are taken for each other, and some never go out.
class PrefixRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Two replicas by chance and the query's own; Serve takes the first of those with the shortest queue."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        chosen = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if len(candidate_replicas) > 1 and isinstance(request, ScoreRequest):
            ids = [replica.replica_id.unique_id for replica in candidate_replicas]
            own = candidate_replicas[home(request, ids)]
            chosen = [own, *(replica for replica in chosen if replica is not own)]
        return [chosen]


def home(request: ScoreRequest, replicas: Sequence[str]) -> int:
    """The index of the replica that the request's chunk belongs to, by rendezvous hashing (Thaler, Ravishankar,
    IEEE/ACM Trans. Netw. 6, 1998): replicas that come or go move no other query. A call's chunks belong to
    different replicas while there are some, as they are to be computed at once."""
    query = blake2b(f"{request.instruction}\0{request.query}".encode("utf-8", "surrogatepass")).digest()
    order = sorted(range(len(replicas)), key=lambda i: blake2b(replicas[i].encode(), key=query).digest())
    return order[request.part % len(replicas)]
