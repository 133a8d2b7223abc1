"""Pages that stand alone: executed notebooks and study indices as HTML that loads nothing from a network.

Style sheet, script and pictures are inside each page, and its content security policy forbids anything from outside,
so a page works from a file system, as an e-mail attachment and in years. Formulas are written in Unicode: there is no
MathJax.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import mistune
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from pygments.formatters import HtmlFormatter

from mlrpl.drawing import DPI, SCREEN
from mlrpl.errors import StudyError
from mlrpl.files import write_text
from mlrpl.process import import_jsonschema
from mlrpl.tables import two_decimals
from mlrpl.words import slug

if TYPE_CHECKING:
    from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent / "templates"
URI_SAFE = " !$()*+,-./:;=?@_~'"  # as they are inside a quoted attribute's URI
PICTURE_TYPES = (".svg", ".png")
LONG_TABLE = 40  # rows; a longer one is folded, so that the page stays a page
WIDGET = "application/vnd.jupyter.widget-view+json"
MARKDOWN = "text/markdown"


@dataclass(frozen=True)
class Link:
    """A link; also allowed as a table's cell. ``href`` is relative to the page."""

    text: str
    href: str


@dataclass(frozen=True)
class Picture:
    """A figure to embed: ``path`` of an svg or png file, ``caption`` in Markdown, ``alt`` for who cannot see it."""

    path: Path
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a study's page, shown in the order of the attributes below.

    Attributes:
        heading: Plain text.
        text: Markdown.
        table: Shown without its index. Text is shown as it is, floats with two decimals, missing values as a dash;
            a cell may be a :class:`Link`. Readers sort it by clicking a heading.
        caption: Markdown above the table.
        figures: Pictures, one below the other.
        links: Links to other pages.
    """

    heading: str
    text: str = ""
    table: pd.DataFrame | None = None
    caption: str = ""
    figures: Sequence[Picture] = ()
    links: Sequence[Link] = ()


@dataclass(frozen=True)
class HomeEntry:
    """A study on the overall page: its page (``href``, relative), what it is (``text``, Markdown), its results."""

    title: str
    href: str
    text: str = ""
    table: pd.DataFrame | None = None


def notebook_to_html(notebook: Path, destination: Path, title: str, home: str) -> None:
    """Write an executed notebook as one page: code folded, progress bars and what cells wrote to stderr left out.

    Args:
        notebook: The executed notebook.
        destination: The page; replaced as a whole or not at all.
        title: Plain text.
        home: Link back to the study's index, relative to the page.

    Raises:
        StudyError: The notebook cannot be read.
        OSError: The page cannot be written.
    """
    import_jsonschema()
    import nbformat
    from nbconvert import HTMLExporter

    try:
        cells = nbformat.read(notebook, as_version=4)
    except OSError as error:
        raise StudyError(f"{notebook}: cannot be read ({error.strerror}); run the study again") from error
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
        raise StudyError(f"{notebook}: not a notebook; delete it and run the study again") from error
    exporter = HTMLExporter(template_name="notebook", extra_template_basedirs=[str(TEMPLATES)])
    exporter.register_filter("png_uri", lambda text: _png_uri(base64.b64decode(text)))
    body, _ = exporter.from_notebook_node(_for_readers(cells))
    _write(destination, "notebook.html.j2", title=title, home=home, body=Markup(body))  # nbconvert has escaped it


def write_index(
    destination: Path,
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    provenance: Mapping[str, object],
    home: str | None = None,
) -> None:
    """Write a study's page.

    Args:
        destination: The page; replaced as a whole or not at all.
        title: Plain text.
        lead: Markdown, the paragraphs before the first section.
        sections: In the order shown.
        provenance: What the results came from, shown folded; nested mappings become dotted names.
        home: Link to the page over all studies, relative to this one.

    Raises:
        StudyError: A picture cannot be read.
        OSError: The page cannot be written.
    """
    facts = [(name, _provenance_text(value)) for name, value in _flat(provenance)]
    _write(destination, "index.html.j2", title=title, home=home, lead=lead, sections=sections, provenance=facts)


def write_home(destination: Path, *, title: str, lead: str, entries: Sequence[HomeEntry]) -> None:
    """Write the page over all studies; arguments as for :func:`write_index`.

    Raises:
        OSError: The page cannot be written.
    """
    _write(destination, "home.html.j2", title=title, home=None, lead=lead, entries=entries)


def _write(destination: Path, template: str, **values: object) -> None:
    write_text(destination, _environment().get_template(template).render(**values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mlrpl"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "markdown": _markdown,
        "cell": _cell,
        "data_uri": _data_uri,
        "screen_width": _screen_width,
        "slug": slug,
    }
    environment.globals |= {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "script": Markup((TEMPLATES / "script.js").read_text(encoding="utf-8")),
        "long_table": LONG_TABLE,
        "code_style": Markup(HtmlFormatter(style="friendly").get_style_defs(".highlight")),
    }
    return environment


def _markdown(text: str) -> Markup:
    """HTML of Markdown; HTML inside it is shown as text, not obeyed."""
    to_html = mistune.create_markdown(escape=True, plugins=["table", "strikethrough"])
    return Markup(to_html(_tied(text)))


def _tied(text: str) -> str:
    """No line breaks before a per cent sign."""
    return text.replace(" %", "\u00a0%")


def _cell(value: object) -> str | Link:
    """What a table shows for a value."""
    if isinstance(value, Link):
        return value
    if pd.isna(value):
        return "—"
    return two_decimals(value) if isinstance(value, float) else str(value)


def _data_uri(path: Path) -> str:
    """The picture as a data URI; SVG as text, which base64 would make a third longer."""
    kind = path.suffix.lower()
    if kind not in PICTURE_TYPES:
        raise StudyError(f"{path}: only {' and '.join(PICTURE_TYPES)} pictures can be embedded")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); make the figure again") from error
    return f"data:image/svg+xml,{quote(content, safe=URI_SAFE)}" if kind == ".svg" else _png_uri(content)


def _png_uri(content: bytes) -> str:
    """A PNG as a data URI of a lossless WebP: the same pixels in a fifth less."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(content)) as picture:
        picture.save(small, "webp", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(small.getvalue()).decode()}"


def _screen_width(path: Path) -> int:
    """Pixels that a saved figure is wide on a page: the same for its SVG and PNG, and as in a notebook."""
    if path.suffix.lower() == ".svg":
        inches = float(re.search(r'<svg\b[^>]*?\bwidth="([\d.]+)pt"', path.read_text(encoding="utf-8"))[1]) / 72
    else:
        with Image.open(path) as picture:
            inches = picture.width / DPI
    return round(inches * SCREEN)


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def _provenance_text(value: object) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)


def _for_readers(notebook: "NotebookNode") -> "NotebookNode":
    """The notebook without stderr and widgets, and without absolute paths in the parameters it was executed with.

    Of a line that was rewritten with carriage returns, what was last seen remains.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _tied(cell.source)
        if cell.cell_type != "code":
            continue
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r'"/[^"\n]*?([^"/\n]*)/?"', r'"…/\1"', cell.source)
        cell.outputs = [
            output for output in cell.outputs if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
        ]
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = re.sub(r"[^\n]*\r(?=[^\n])", "", output.text.replace("\r\n", "\n"))
            elif MARKDOWN in output.get("data", {}):
                output.data[MARKDOWN] = _tied(output.data[MARKDOWN])
    return notebook
