"""Exit code 0 if the server in this container is alive. LLMCTL_HEALTH_URL: where it listens, if not on port 8000."""

import os
import ssl
import sys
import urllib.request

url = os.environ.get("LLMCTL_HEALTH_URL", "http://127.0.0.1:8000/health")
# The certificate is for the name that clients use, not for this address.
context = ssl._create_unverified_context() if url.startswith("https:") else None
try:
    urllib.request.urlopen(url, timeout=4, context=context).close()
except OSError as error:  # an HTTP error status included
    sys.exit(f"{url}: {error}")
