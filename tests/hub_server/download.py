"""File lists and files."""

from pathlib import Path
from urllib.parse import parse_qs, unquote

from starlette.responses import FileResponse, JSONResponse, StreamingResponse

from hub_server.state import base_url, error, file_entry, find_repo, folder_entry, resolve
from hub_server.xet import rebuild_from_xet


async def tree(request):
    _, repo = find_repo(request)
    commit_id = resolve(repo, request.path_params["revision"])
    files = repo["commits"][commit_id]["files"]
    folder = unquote(request.path_params.get("path", "")).strip("/")
    prefix = folder + "/" if folder else ""
    recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
    entries, folders = [], set()
    for path in sorted(name for name in files if name.startswith(prefix)):
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            parent = prefix + "/".join(parts[:depth])
            if parent not in folders and (recursive or depth == 1):
                folders.add(parent)
                entries.append(folder_entry(parent))
        if recursive or len(parts) == 1:
            entries.append(file_entry(path, files[path]))
    if prefix and not entries:
        return error(404, "EntryNotFound", f"{folder} does not exist on {commit_id}")
    return JSONResponse(entries, headers={"X-Repo-Commit": commit_id})


async def paths_info(request):
    _, repo = find_repo(request)
    files = repo["commits"][resolve(repo, request.path_params["revision"])]["files"]
    if "json" in request.headers.get("content-type", ""):
        paths = (await request.json())["paths"]
    else:
        paths = parse_qs((await request.body()).decode()).get("paths", [])
    entries = []
    for path in paths:
        if path in files:
            entries.append(file_entry(path, files[path]))
        elif any(name.startswith(path.rstrip("/") + "/") for name in files):
            entries.append(folder_entry(path))
    return JSONResponse(entries)


async def resolve_file(request):
    hub = request.app.state.hub
    repo_id, repo = find_repo(request, content=True)
    commit_id = resolve(repo, request.path_params["revision"])
    name = request.path_params["path"]
    file = repo["commits"][commit_id]["files"].get(name)
    if file is None:
        missing = error(404, "EntryNotFound", "Entry not found")
        missing.headers["X-Repo-Commit"] = commit_id
        return missing
    headers = {
        "X-Repo-Commit": commit_id,
        "Accept-Ranges": "bytes",
        "ETag": f'"{file.get("lfs") or file["oid"]}"',
        "Content-Disposition": f'inline; filename="{Path(name).name}"',
    }
    if "lfs" not in file:
        return FileResponse(hub.blobs / file["oid"], headers=headers)
    path = hub.lfs / file["lfs"]
    headers |= {"X-Linked-Etag": f'"{file["lfs"]}"', "X-Linked-Size": str(file["size"])}
    if "xet" in file:
        token_url = f"{base_url(request)}/api/models/{repo_id}/xet-read-token/{commit_id}"
        headers |= {"X-Xet-Hash": file["xet"], "Link": f'<{token_url}>; rel="xet-auth"'}
        if not path.exists():
            rebuild_from_xet(hub, file, path)
    if hub.faults.cut and request.method == "GET" and "range" not in request.headers:
        body = _break_after(path, hub.faults.cut)
        return StreamingResponse(body, headers={**headers, "Content-Length": str(file["size"])})
    return FileResponse(path, headers=headers)  # answers HEAD and Range itself


def _break_after(path, count):
    with open(path, "rb") as file:
        yield file.read(count)
    raise ConnectionResetError("injected")
