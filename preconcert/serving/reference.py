"""The API as a page to read, from its OpenAPI description; loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { --paper: #fbfaf7; --card: #fff; --ink: #1d2129; --soft: #5f6673; --faint: #e5e3dc; --mark: #2f6fde; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1d2026; --ink: #e9e8e4; --soft: #9ea5b3;
  --faint: #31353e; --mark: #7aa9ff; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 ui-sans-serif, system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.2rem 3rem; }
section { background: var(--card); border: 1px solid var(--faint); border-radius: .8rem; padding: .9rem 1.1rem;
  margin: .9rem 0; overflow-x: auto; }
h1 { font-size: 1.6rem; } h2 { font-size: 1rem; margin: 0; font-family: ui-monospace, monospace; }
h2 b { color: var(--mark); margin-right: .5rem; } h3 { font-size: .85rem; color: var(--soft); margin: .8rem 0 .2rem; }
p { margin: .4rem 0; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
td { border-top: 1px solid var(--faint); padding: .25rem .8rem .25rem 0; vertical-align: top; }
td:first-child, td:nth-child(2) { font-family: ui-monospace, monospace; font-size: .85rem; }
td:nth-child(2) { color: var(--soft); } a { color: var(--mark); }
"""


def reference_page(description: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description."""
    info, schemas = description["info"], description.get("components", {}).get("schemas", {})
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        "<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>",
        f"<title>{escape(info['title'])}: the API</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>The API of {escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>",
        "<p>Errors are <code>{&quot;error&quot;: {&quot;type&quot;, &quot;message&quot;}}</code>. A 503 says in ",
        "<code>Retry-After</code> when to come again. The same as JSON: <a href='/openapi.json'>/openapi.json</a>.</p>",
    ]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<section><h2><b>{method.upper()}</b>{escape(path)}</h2>")
            parts.append(f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            parts += _fields("body", body, schemas)
            for status, answer in operation["responses"].items():
                found = answer.get("content", {}).get("application/json", {}).get("schema")
                if status != "422":
                    parts += _fields(f"answer {status}", found, schemas)
            parts.append("</section>")
    parts.append("</main></body></html>")
    return "".join(parts)


def _fields(title: str, schema: Mapping[str, Any] | None, schemas: Mapping[str, Any]) -> Iterator[str]:
    """A table of a body's keys."""
    content = _resolved(schema or {}, schemas)
    if "properties" not in content:
        return
    required = content.get("required", ())
    yield f"<h3>{escape(title)}</h3><table>"
    for name, each in content["properties"].items():
        text = " ".join(str(each.get("description", "")).split())
        default = f" = {each['default']}" if "default" in each and each["default"] not in (None, {}, []) else ""
        sign = " *" if name in required and title == "body" else ""
        kind = escape(_kind(each) + default)
        yield f"<tr><td>{escape(name)}{sign}</td><td>{kind}</td><td>{escape(text)}</td></tr>"
    yield "</table>"


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    for each in (schema, *schema.get("anyOf", ())):
        if "$ref" in each:
            found: Mapping[str, Any] = schemas[each["$ref"].rpartition("/")[2]]
            return found
    return schema


def _kind(schema: Mapping[str, Any]) -> str:
    """A type in a word or two."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " | ".join(dict.fromkeys(_kind(each) for each in schema[several]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"mapping to {_kind(schema['additionalProperties'])}"
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    return str(schema.get("type", "any"))


__all__ = ["reference_page"]
