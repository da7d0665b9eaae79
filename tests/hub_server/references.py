"""Branches, tags, pull requests, commits."""

import json
from urllib.parse import unquote

from starlette.responses import JSONResponse

from hub_server.state import error, find_repo, resolve


def _ref(name, ref, commit_id):
    return {"name": name, "ref": ref, "targetCommit": commit_id}


async def list_refs(request):
    _, repo = find_repo(request)
    refs = {
        "branches": [_ref(name, f"refs/heads/{name}", commit_id) for name, commit_id in repo["branches"].items()],
        "tags": [_ref(name, f"refs/tags/{name}", commit_id) for name, commit_id in repo["tags"].items()],
        "converts": [],
    }
    if request.query_params.get("include_prs"):
        refs["pullRequests"] = [_ref(name, name, commit_id) for name, commit_id in repo["pull_requests"].items()]
    return JSONResponse(refs)


async def list_commits(request):
    _, repo = find_repo(request)
    commit_id, found = resolve(repo, request.path_params["revision"]), []
    while commit_id:
        commit = repo["commits"][commit_id]
        authors = [{"user": repo["owner"]}]
        found.append(
            {"id": commit_id, "title": commit["title"], "message": "", "date": commit["date"], "authors": authors}
        )
        commit_id = commit["parent"]
    return JSONResponse(found, headers={"X-Total-Count": str(len(found))})


async def branch(request):
    hub = request.app.state.hub
    _, repo = find_repo(request, write=True)
    name, body = unquote(request.path_params["reference"]), await request.body()
    with hub.lock:
        if request.method == "DELETE":
            repo["branches"].pop(name, None)
        elif name in repo["branches"]:
            return error(409, None, "Reference already exists")
        else:
            start = json.loads(body).get("startingPoint") if body else None
            repo["branches"][name] = resolve(repo, start or "main")
        hub.save()
    return JSONResponse({})


async def tag(request):
    """DELETE names the tag in the path; POST names the revision there and the tag in the body."""
    hub = request.app.state.hub
    _, repo = find_repo(request, write=True)
    reference = unquote(request.path_params["reference"])
    with hub.lock:
        if request.method == "DELETE":
            repo["tags"].pop(reference, None)
        else:
            name = (await request.json())["tag"]
            if name in repo["tags"]:
                return error(409, None, "Tag reference exists already")
            repo["tags"][name] = resolve(repo, reference)
        hub.save()
    return JSONResponse({})
