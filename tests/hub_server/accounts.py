"""Who calls, and repositories: create, delete, settings, access requests."""

import yaml
from starlette.responses import JSONResponse, Response

from hub_server.state import add_commit, base_url, caller, error, find_repo, resolve


async def whoami(request):
    user, role = caller(request)
    if user is None:
        return error(401, None, "Invalid username or password.")
    token = {"accessToken": {"displayName": "test", "role": role}}
    return JSONResponse({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": token})


async def create_repo(request):
    hub, body = request.app.state.hub, await request.json()
    user, role = caller(request)
    if user is None:
        return error(401, None, "Invalid username or password.")
    kind = (body.get("type") or "model") + "s"
    namespace = body.get("organization") or user
    if role != "write" or namespace != user:
        return error(
            403, None, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"'
        )
    repo_id = f"{namespace}/{body['name']}"
    url = f"{base_url(request)}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    with hub.lock:
        if f"{kind}/{repo_id}" in hub.repos:
            return error(409, None, "You already created this model repo", url=url)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repo = {"owner": user, "private": private, "branches": {}, "tags": {}, "commits": {}, "pull_requests": {}}
        attributes = hub.store_blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repo["branches"]["main"] = add_commit(repo, None, {".gitattributes": attributes}, "initial commit")
        hub.repos[f"{kind}/{repo_id}"] = repo
        hub.save()
    return JSONResponse({"url": url, "id": repo_id})


async def delete_repo(request):
    hub, body = request.app.state.hub, await request.json()
    user, role = caller(request)
    key = f"{body.get('type') or 'model'}s/{body.get('organization') or user}/{body['name']}"
    if key not in hub.repos:
        return error(404, "RepoNotFound", "Repository not found")
    if hub.repos[key]["owner"] != user or role != "write":
        return error(403, None, "no rights")
    with hub.lock:
        del hub.repos[key]
        hub.save()
    return Response()


async def settings(request):
    hub, body = request.app.state.hub, await request.json()
    _, repo = find_repo(request, write=True)
    with hub.lock:
        if "visibility" in body:
            repo["private"] = body["visibility"] == "private"
        repo.update({key: body[key] for key in ("private", "gated") if key in body})
        hub.save()
    return JSONResponse({"private": repo["private"], "gated": repo.get("gated", False)})


async def grant_access(request):
    hub, body = request.app.state.hub, await request.json()
    _, repo = find_repo(request, write=True)
    with hub.lock:
        repo.setdefault("granted", []).append(body["user"])
        hub.save()
    return JSONResponse({})


async def repo_info(request):
    repo_id, repo = find_repo(request)
    commit_id = resolve(repo, request.path_params.get("revision", "main"))
    commit = repo["commits"][commit_id]
    return JSONResponse({
        "_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo["owner"], "sha": commit_id,
        "private": repo["private"], "gated": repo.get("gated", False), "disabled": False,
        "downloads": 0, "likes": 0, "tags": [], "createdAt": commit["date"], "lastModified": commit["date"],
        "siblings": [{"rfilename": path} for path in sorted(commit["files"])],
    })  # fmt: skip


async def validate_yaml(request):
    content, errors = (await request.json())["content"], []
    if content.startswith("---\n"):
        try:
            yaml.safe_load(content[4:].split("\n---", 1)[0])
        except yaml.YAMLError as problem:
            errors.append({"message": f"YAML: {problem}"[:200]})
    return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)
