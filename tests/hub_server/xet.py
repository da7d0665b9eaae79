"""The content store: the real hf_xet client works on a local folder, so no server is needed."""

import os
import struct
import time

from starlette.responses import JSONResponse

from hub_server.state import error, find_repo, need_write_token


async def xet_token(request):
    """Send the real hf_xet client to a folder instead of a content-store server."""
    hub, writing = request.app.state.hub, request.path_params["access"] == "write"
    if not hub.xet:
        return error(404, None, "xet not enabled")
    as_pull_request = bool(request.query_params.get("create_pr"))
    find_repo(request, write=writing and not as_pull_request, content=not writing)
    if as_pull_request:
        need_write_token(request)
    expires = int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": hub.cas, "X-Xet-Access-Token": "test", "X-Xet-Token-Expiration": str(expires)}
    return JSONResponse({"casUrl": hub.cas, "exp": expires, "accessToken": "test"}, headers=headers)


def find_xet_hash(hub, sha256):
    """sha256 -> xet hash, from the shard files that the client leaves in the store (records of 48 bytes)."""

    def as_text(raw):
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

    for shard in (hub.root / "cas/xet/xorbs/shards").glob("*.mdb"):
        data, at = shard.read_bytes(), 48
        while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
            file_hash = data[at : at + 32]
            flags, segments = struct.unpack("<II", data[at + 32 : at + 40])
            has_verification, has_sha256 = flags >> 31 & 1, flags >> 30 & 1
            at += 48 + 48 * segments * (1 + has_verification)
            if has_sha256:
                if as_text(data[at : at + 32]) == sha256:
                    return as_text(file_hash)
                at += 48
    return None


def rebuild_from_xet(hub, file, path):
    """For clients without hf_xet: write the plain file."""
    import hf_xet

    group = hf_xet.XetSession().new_download_stream_group(endpoint=hub.cas)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as out:
        for chunk in group.download_stream(hf_xet.XetFileInfo(file["xet"], file["size"])):
            out.write(bytes(chunk))
    os.replace(temporary, path)
