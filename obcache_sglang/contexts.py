"""Files of compressed contexts:  python -m obcache_sglang.contexts list|verify|save|load|delete

`list`, `verify` and `delete` read a folder (--folder DIR), without a server. `save` and `load` ask a server that runs (--url), and so do `list` and `delete`
with --url.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from obcache_sglang.errors import ObcacheError
from obcache_sglang.kv.files import BadFile, Reader, empty_layer
from obcache_sglang.kv.folder import Folder, listed

KEY_VARIABLE = "OBCACHE_ADMIN_KEY"
_URL = "http://127.0.0.1:30000"
_HEADERS = {"cache_salt": "X-Cache-Salt", "extra_key": "X-Extra-Key"}
_TIMEOUT_SECONDS = 900


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where something was not as it should be."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (ObcacheError, requests.RequestException) as error:
        print(f"obcache_sglang.contexts: {error}", file=sys.stderr)
        return 1


def verify(folder: Folder, names: Sequence[str] = ()) -> dict[str, str]:
    """What is wrong with the files of a folder, by file; "" where nothing is. names: only of these contexts.

    Every byte is read. A context of which a rank's file is missing has that in place of the others.
    """
    entries = [each for each in folder.entries() if not names or each.name in names]
    complete = folder.complete()
    found = {name: "there is no such file" for name in names if all(each.name != name for each in entries)}
    for each in entries:
        file = folder.path_of(each.name, each.rank, each.num_ranks).name
        try:
            with folder.reading(each.name, each.rank, each.num_ranks) as reader:
                _read_all(reader)
            whole = (each.name, each.num_ranks) in complete
            found[file] = "" if whole else f"is whole, but not all of the context's {each.num_ranks} files are there"
        except (BadFile, OSError) as error:
            found[file] = str(error)
    return found


def _read_all(reader: Reader) -> None:
    reader.table()
    layer = empty_layer(reader.head)
    for _ in range(reader.head.served.num_layers):
        reader.layer(*layer)
    reader.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m obcache_sglang.contexts", description="Files of compressed contexts.")
    commands = parser.add_subparsers(required=True, metavar="list|verify|save|load|delete")

    def command(name: str, run: Any, text: str, *, folder: bool, url: bool) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run, url=None, folder=None)
        if folder:
            made.add_argument("--folder", type=Path, metavar="DIR", required=not url, help="a server's --obcache-folder")
        if url:
            default = None if folder else _URL
            made.add_argument("--url", default=default, help="of a server that runs" + ("" if folder else f"; default: {_URL}"))
            made.add_argument(
                "--key",
                default=os.environ.get(KEY_VARIABLE),
                help=f"the server's admin key; default: the variable {KEY_VARIABLE}",
            )
            for name in _HEADERS:
                made.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help="of the contexts' namespace")
        return made

    command("list", _list, "Lists the contexts of a folder, the one used last first.", folder=True, url=True)
    made = command(
        "verify", _verify, "Reads every byte of the files of a folder, and says which are not whole.", folder=True, url=False
    )
    made.add_argument("files", nargs="*", metavar="FILE", help="only these, by their names in `list`")
    made = command("save", _save, "Has a server save contexts that it holds.", folder=False, url=True)
    made.add_argument("names", nargs="+", metavar="NAME", help="as in GET /obcache/contexts")
    made = command("load", _load, "Has a server load files of its folder.", folder=False, url=True)
    made.add_argument("files", nargs="+", metavar="FILE", help="as in `list`")
    made = command("delete", _delete, "Deletes files.", folder=True, url=True)
    made.add_argument("files", nargs="+", metavar="FILE", help="as in `list`")
    return parser


def _list(args: argparse.Namespace) -> int:
    files = _ask(args, "GET", "/obcache/files")["files"] if args.url else listed(_opened(args.folder))
    for each in files:
        if "problem" in each:
            print(f"{each['file']}  {each['problem']}")
            continue
        settings = each["settings"]
        print(
            f"{each['file']}  {each['context_tokens']} tokens, {each['kept_tokens']} kept, {each['bytes'] / 1e6:.1f} MB, "
            f"{settings['method']} {settings['budget']} ratio {settings['compression_ratio']:g}"
        )
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = verify(_opened(args.folder), args.files)
    for file, problem in found.items():
        print(f"{file}  {problem or 'ok'}")
    return int(any(found.values()))


def _save(args: argparse.Namespace) -> int:
    for name in args.names:
        saved = _ask(args, "POST", f"/obcache/contexts/{name}/save")
        print(f"{saved['file']}  {saved['bytes'] / 1e6:.1f} MB in {saved['seconds']} s")
    return 0


def _load(args: argparse.Namespace) -> int:
    for file in args.files:
        print(_ask(args, "POST", "/obcache/contexts/load", {"file": file})["name"])
    return 0


def _delete(args: argparse.Namespace) -> int:
    folder = None if args.url else _opened(args.folder)
    for file in args.files:
        if folder is None:
            _ask(args, "DELETE", f"/obcache/files/{file}")
        elif not folder.delete(file):
            raise ObcacheError(f"There is no file {file}.")
        print(file)
    return 0


def _opened(path: Path | None) -> Folder:
    if path is None:
        raise ObcacheError("Give --folder DIR, or --url of a server.")
    return Folder.opened(path, make=False)  # not to make one of a folder that was misspelt


def _ask(args: argparse.Namespace, method: str, path: str, body: Any = None) -> Any:
    headers = {header: getattr(args, name) for name, header in _HEADERS.items() if getattr(args, name)}
    if args.key:
        headers["Authorization"] = f"Bearer {args.key}"
    response = requests.request(method, args.url.rstrip("/") + path, json=body, headers=headers, timeout=_TIMEOUT_SECONDS)
    if response.status_code != 200:
        try:
            said = response.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            said = response.text
        raise ObcacheError(f"{response.url} answered {response.status_code}: {said}")
    return response.json()


if __name__ == "__main__":
    sys.exit(main())
