"""As much of a Weights & Biases server as a run needs: `python wandb_server.py PORT FILE`.

Appends the metrics that it gets to FILE, one JSON object a line.
"""

import gzip
import http.server
import json
import sys
from pathlib import Path

PROJECT = {"id": "project", "name": "lopt", "entity": {"id": "entity", "name": "me"}}
BUCKET = {"id": "run", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0, "project": PROJECT}
REPLIES = {
  "viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
  "model": None,
  "upsertBucket": {"bucket": BUCKET, "inserted": True},
  "createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []},
}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def do_POST(self) -> None:
    body = self.rfile.read(int(self.headers.get("content-length", 0)))
    if self.path.endswith("/file_stream"):
      content = json.loads(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
      lines = content.get("files", {}).get("wandb-history.jsonl", {"content": []})["content"]
      with Path(sys.argv[2]).open("a", encoding="utf-8") as file:
        file.writelines(line.rstrip("\n") + "\n" for line in lines)
    reply = json.dumps({"data": REPLIES} if self.path == "/graphql" else {}).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(reply)))
    self.end_headers()
    self.wfile.write(reply)

  def log_message(self, format: str, *args: object) -> None: ...


if __name__ == "__main__":
  with http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler) as server:
    server.serve_forever()
