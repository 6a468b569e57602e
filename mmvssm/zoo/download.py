"""Files of the zoo on this machine: fetched once, whole or not at all.

Environment variables:
    MMVSSM_CACHE_DIR: Files lie in its folder ``weights``.
    MMVSSM_ZOO_MIRROR: Takes the place of scheme and host of every address, for
        machines behind a firewall: ``http://127.0.0.1:8000``.
    HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE: As huggingface_hub takes them, for
        ``hf://`` addresses.
"""

import hashlib
import os
import re
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from filelock import FileLock
from mmengine.logging import print_log
from torch.hub import tqdm

from mmvssm.errors import ZooError
from mmvssm.ops.cache import cache_folder
from mmvssm.zoo.table import SCHEME, find

MIRROR_VARIABLE = 'MMVSSM_ZOO_MIRROR'
HF_SCHEME = 'hf://'
_SCHEMES = (SCHEME, HF_SCHEME, 'http://', 'https://')
_HF = re.compile(r'hf://([^/@]+/[^/@]+)/([^@]+?)(?:@(.+))?')
_BLOCK = 1 << 20
_TRIES = 3
_PAUSE = 1.0  # Seconds before the second try; twice that before the third.
_TIMEOUT = 30  # Seconds without a byte.
_PAGE = re.compile(rb'\s*<(!doctype html|html|head|\?xml)', re.IGNORECASE)
_GOOGLE_DRIVE = 'drive.google.com'


class _BrokenOff(Exception):
    """A transfer that may be tried again."""


@dataclass(frozen=True)
class _Place:
    """Where a file comes from, and the folder that is its own.

    Attributes:
        source: What the user named.
        url: Address, None if there is none.
        folder: Holds the file, and beside it what is known of it.
        name: Of the file; None if the server says it.
        sha256: Of the file, where it is published.
    """

    source: str
    url: str | None
    folder: Path
    name: str | None
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """The file, whether it is there or not."""
        if self.name:
            return self.folder / self.name
        found = [p for p in self.folder.glob('*') if not p.name.startswith('.')]
        return found[0] if found else self.folder / _last_part(self.url)


def is_address(source: object) -> bool:
    """Whether it names a file that :func:`fetch` finds, rather than a path."""
    return isinstance(source, str) and source.startswith(_SCHEMES)


def fetch(source: str) -> Path:
    """The file of a name or an address, downloaded if it is not here yet.

    Processes of one machine wait for the one that downloads. What broke off goes on
    where it stopped. The SHA-256 is noted at the first download and compared ever
    after.

    Args:
        source: ``mmvssm://NAME``, ``hf://OWNER/REPOSITORY/FILE[@REVISION]``, or an
            http(s) address.

    Returns:
        Its path on this machine.

    Raises:
        ZooError: There is no such name, nothing was published under it, or the file
            cannot be downloaded or is not the one it was.
    """
    if source.startswith(HF_SCHEME) and _has_huggingface_hub():
        return _fetch_by_huggingface_hub(source)
    place = _place(source)
    if not place.path.is_file():
        if place.url is None:
            raise ZooError(
                f"no weights were ever published for '{find(source).name}': the zoo "
                'has their figures alone'
            )
        place.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(place.folder / '.lock'):
            # Another process may have come first.
            if not place.path.is_file():
                _download(place)
    _compare_hash(place)
    return place.path


def path_of(source: str) -> Path:
    """Where the file of a name or an address lies, or would.

    Raises:
        ZooError: There is no such name.
    """
    return _place(source).path


def verify(source: str) -> tuple[Path, str]:
    """Check a file that was fetched before.

    Returns:
        Its path and its SHA-256.

    Raises:
        ZooError: It is not there, or has changed.
    """
    place = _place(source)
    if not place.path.is_file():
        raise ZooError(f'{source} is not here: no file at {place.path}')
    return place.path, _compare_hash(place)


# Places


def _place(source: str) -> _Place:
    folder = cache_folder() / 'weights'
    if source.startswith(HF_SCHEME):
        repository, file, revision = _parse_hf(source)
        endpoint = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
        url = f'{endpoint}/{repository}/resolve/{quote(revision)}/{quote(file)}'
        name = PurePosixPath(file).name
        folder = folder / 'hf' / repository.replace('/', '--') / _short_hash(source)
        return _Place(source, url, folder, name)
    if source.startswith(('http://', 'https://')):
        return _Place(source, source, folder / 'url' / _short_hash(source), None)
    row = find(source)
    return _Place(source, row.url, folder / row.name, row.file or None, row.sha256)


def _parse_hf(source: str) -> tuple[str, str, str]:
    match = _HF.fullmatch(source)
    if match is None or '..' in source:
        raise ZooError(
            f'{source} is no address of a file: it has the form '
            'hf://OWNER/REPOSITORY/FILE or hf://OWNER/REPOSITORY/FILE@REVISION'
        )
    return match[1], match[2], match[3] or 'main'


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _last_part(url: str | None) -> str:
    return _plain_name(unquote(urlsplit(url or '').path)) or 'weights.pth'


def _plain_name(name: str) -> str:
    """The last part, which names a file in this folder and nothing else."""
    return name.replace('\\', '/').rpartition('/')[2].lstrip('.')


def _mirrored(url: str) -> str:
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror:
        return url
    scheme, host = urlsplit(mirror)[:2]
    if not scheme or not host:
        raise ZooError(
            f'{MIRROR_VARIABLE} must be an address such as http://127.0.0.1:8000, got '
            f'{mirror!r}'
        )
    return urlunsplit((scheme, host, *urlsplit(url)[2:]))


# Hashes


def _compare_hash(place: _Place) -> str:
    digest = hashlib.sha256()
    with place.path.open('rb') as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    found, note = digest.hexdigest(), place.folder / '.sha256'
    known = place.sha256 or (note.read_text().strip() if note.is_file() else None)
    if known is None:
        try:
            note.write_text(f'{found}\n')
        except OSError:
            pass  # A cache that others may only read.
    elif found != known:
        was = 'published' if place.sha256 else 'downloaded at first'
        raise ZooError(
            f'{place.path} is not the file that was {was}: its SHA-256 is {found}, '
            f'expected was {known}. Delete the folder {place.folder} to download it '
            'again'
        )
    return found


# Downloads


def _download(place: _Place) -> None:
    """Put the file in its place; the lock is held."""
    url = _mirrored(place.url)
    if urlsplit(url).hostname == _GOOGLE_DRIVE:
        _download_by_gdown(place, url)
        return
    print_log(f'Downloading {url} to {place.folder}', 'current')
    part = place.folder / '.part'
    reason: Exception | None = None
    for attempt in range(_TRIES):
        time.sleep(attempt * _PAUSE)
        try:
            name = _transfer(url, part, place)
            break
        except HTTPError as error:
            reason = error
            if error.code < 500 and error.code not in (408, 416, 429):
                raise _failed(place, url, f'the server says {error}') from error
            if error.code == 416:
                part.unlink(missing_ok=True)
        except (OSError, HTTPException, _BrokenOff) as error:
            reason = error
    else:
        text = getattr(reason, 'reason', None) or str(reason)
        raise _failed(place, url, f'{text} ({_TRIES} tries)') from reason
    if place.name is None:
        name = _plain_name(name or '') or _last_part(url)
        part.replace(place.folder / name)
    else:
        part.replace(place.path)
    (place.folder / '.validator').unlink(missing_ok=True)


def _failed(place: _Place, url: str, reason: str) -> ZooError:
    return ZooError(
        f'cannot download {place.source} from {url}: {reason}. You can fetch the file '
        f'by other means and put it at {place.path}, or name a mirror with '
        f'{MIRROR_VARIABLE}'
    )


def _transfer(url: str, part: Path, place: _Place) -> str | None:
    """Go on with a file where it broke off, or begin it.

    Returns:
        The name that the server gives it, if any.
    """
    validator = place.folder / '.validator'
    have = part.stat().st_size if part.is_file() and validator.is_file() else 0
    headers = {'User-Agent': 'mmvssm', 'Accept-Encoding': 'identity'}
    token = os.environ.get('HF_TOKEN')
    if token and place.source.startswith(HF_SCHEME):
        headers['Authorization'] = f'Bearer {token}'
    if have:
        headers['Range'] = f'bytes={have}-'
        headers['If-Range'] = validator.read_text()
    with urlopen(Request(url, headers=headers), timeout=_TIMEOUT) as response:
        total = response.headers.get('Content-Length')
        total = int(total) if total and total.isdigit() else None
        if response.status == 206:
            if not _goes_on_at(response, have):
                part.unlink()
                raise _BrokenOff('the server went on at another place of the file')
            total = None if total is None else have + total
        else:
            have = 0
            validator.unlink(missing_ok=True)
            if tag := _validator(response):
                validator.write_text(tag)
        size = _write(response, part, have, total, place, url)
        if total is not None and size != total:
            raise _BrokenOff(f'it broke off after {size} of {total} bytes')
        return response.headers.get_filename()


def _goes_on_at(response: HTTPResponse, have: int) -> bool:
    match = re.match(r'bytes (\d+)-', response.headers.get('Content-Range', ''))
    return match is not None and int(match[1]) == have


def _validator(response: HTTPResponse) -> str | None:
    """What tells this version of the file from another one."""
    tag = response.headers.get('ETag')
    if tag and not tag.startswith('W/'):
        return tag
    return response.headers.get('Last-Modified')


def _write(
    response: HTTPResponse,
    part: Path,
    have: int,
    total: int | None,
    place: _Place,
    url: str,
) -> int:
    """Write what comes; gives the size of the file then."""
    with (
        part.open('ab' if have else 'wb') as file,
        tqdm(
            total=total,
            initial=have,
            unit='B',
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        ) as bar,
    ):
        first = True
        while block := response.read(_BLOCK):
            if first and not have and _PAGE.match(block):
                raise _failed(
                    place,
                    url,
                    'the server sent a page, not a file: open the address in a '
                    'browser to see what it asks for',
                )
            first = False
            file.write(block)
            bar.update(len(block))
        return file.tell()


def _download_by_gdown(place: _Place, url: str) -> None:
    if find_spec('gdown') is None:
        raise _failed(
            place, url, 'Google Drive shows a page first; `pip install gdown` helps'
        )
    import gdown

    part = place.folder / '.part'
    try:
        done = gdown.download(url, str(part), fuzzy=True)
    except Exception as error:  # gdown has errors of its own, and requests' ones.
        raise _failed(place, url, str(error)) from error
    if done is None or not part.is_file():
        raise _failed(place, url, 'gdown got no file')
    part.replace(place.path)


# Hugging Face


def _has_huggingface_hub() -> bool:
    # A mirror is asked by plain http.
    mirrored = os.environ.get(MIRROR_VARIABLE)
    return not mirrored and find_spec('huggingface_hub') is not None


def _fetch_by_huggingface_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository, file, revision = _parse_hf(source)
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # Its errors have no common class in all versions.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ZooError(f'cannot download {source}: {reason}') from error
