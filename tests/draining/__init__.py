import os
import secrets

from serve_app.launch import ENVIRONMENT, FAST
from tests.system.conftest import ROOT

# Serve and Ray read these as they are imported.
os.environ.update({**ENVIRONMENT, **FAST, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
# Gateways stay for half a minute otherwise, in which load balancers outside may see that they go. Here is none.
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "10"
# Replicas import the scorers.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
