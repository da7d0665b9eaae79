"""Routes."""

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub_server.accounts import create_repo, delete_repo, grant_access, repo_info, settings, validate_yaml, whoami
from hub_server.download import paths_info, resolve_file, tree
from hub_server.references import branch, list_commits, list_refs, tag
from hub_server.state import NO_FAULTS, Hub, RefusedError
from hub_server.upload import commit, lfs_batch, lfs_complete, lfs_part, lfs_put, lfs_verify, preupload
from hub_server.xet import xet_token


async def request_log(request):
    return JSONResponse(request.app.state.hub.log)


async def accept(request):
    return Response()


API = "/api/{kind}/{namespace}/{name}"
REPO = "/{namespace}/{name}"
ROUTES = [
    Route("/_log", request_log),
    Route("/_lfs/{oid}", lfs_put, methods=["PUT"]),
    Route("/_lfs_part/{oid}/{number:int}", lfs_part, methods=["PUT"]),
    Route("/_lfs_complete/{oid}", lfs_complete, methods=["POST"]),
    Route("/_lfs_verify/{rest:path}", lfs_verify, methods=["POST"]),
    Route("/api/whoami-v2", whoami),
    Route("/api/repos/create", create_repo, methods=["POST"]),
    Route("/api/repos/delete", delete_repo, methods=["DELETE"]),
    Route("/api/validate-yaml", validate_yaml, methods=["POST"]),
    Route("/api/telemetry/{rest:path}", accept),
    Route(API + "/settings", settings, methods=["PUT"]),
    Route(API + "/user-access-request/grant", grant_access, methods=["POST"]),
    Route(API + "/preupload/{revision}", preupload, methods=["POST"]),
    Route(API + "/commit/{revision}", commit, methods=["POST"]),
    Route(API + "/xet-{access}-token/{revision}", xet_token),
    Route(API + "/tree/{revision}", tree),
    Route(API + "/tree/{revision}/{path:path}", tree),
    Route(API + "/paths-info/{revision}", paths_info, methods=["POST"]),
    Route(API + "/refs", list_refs),
    Route(API + "/commits/{revision}", list_commits),
    Route(API + "/branch/{reference}", branch, methods=["POST", "DELETE"]),
    Route(API + "/tag/{reference}", tag, methods=["POST", "DELETE"]),
    Route(API + "/auth-check", repo_info),
    Route(API + "/revision/{revision}", repo_info),
    Route(API, repo_info),
    Route(REPO + ".git/info/lfs/objects/batch", lfs_batch, methods=["POST"]),
    Route("/{prefix}" + REPO + ".git/info/lfs/objects/batch", lfs_batch, methods=["POST"]),
    Route(REPO + "/resolve/{revision}/{path:path}", resolve_file),
    Route("/{prefix}" + REPO + "/resolve/{revision}/{path:path}", resolve_file),
]


async def _refuse(request, refused):
    return refused.response


def make_app(root, xet=False, faults=NO_FAULTS):
    """The ASGI application.

    Routes match the raw path: a quoted slash, as in refs%2Fpr%2F1, must stay inside its segment.
    """
    hub = Hub(root, xet, faults)
    inner = Starlette(routes=ROUTES, exception_handlers={RefusedError: _refuse})
    inner.state.hub = hub

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return await inner(scope, receive, send)
        raw, query = scope["raw_path"].decode().split("?")[0], scope["query_string"].decode()
        line = {"method": scope["method"], "path": f"{raw}?{query}" if query else raw}

        async def send_and_note(message):
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
            await send(message)

        if raw != "/_log":
            hub.log.append(line)
        await inner({**scope, "path": raw.replace("%20", " ")}, receive, send_and_note)

    return app
