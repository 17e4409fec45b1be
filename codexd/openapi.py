"""GET /openapi.json: the HTTP interface for programs, in OpenAPI 3.1.

Written by hand; tests hold it against the routes, the keys of a task file, the
fields of a task and the manual.  The token is optional in it, because only TCP
needs one.
"""

from __future__ import annotations

from collections.abc import Mapping

from codexd import __version__, document
from codexd.model import COST_KEYS, ID_PATTERN, USAGE_KEYS, Resume, Sandbox, State
from codexd.outcome import Outcome

Schema = Mapping[str, object]


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_CONTROL = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"


def _not_blank(never: str) -> str:
    """The pattern of a text that is not blank and has none of these characters."""
    return rf"^[^{never}]*[^\s{never}][^{never}]*$"


def _text(most: int, about: str) -> Schema:
    pattern = _not_blank(_CONTROL)
    return {"type": "string", "pattern": pattern, "maxLength": most, "description": about}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: Mapping[str, Schema], required: list[str] | None = None) -> Schema:
    """An object with these keys and no others; all are there unless `required` names some."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


_STRING: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number", "minimum": 0}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TIME: Schema = {"type": "string", "format": "date-time"}
_ID: Schema = {"type": "string", "pattern": f"^{ID_PATTERN}$"}
_PATH: Schema = {  # a file's name may have any character but NUL
    "type": "string",
    "pattern": r"^(~(/[^\u0000]*)?|[^~\u0000][^\u0000]*)$",
    "maxLength": 4096,
    "description": "Absolute, below ~, or relative to the working directory.",
}
_PATHS: Schema = {"type": "array", "maxItems": 20, "items": _PATH}
_NAME: Schema = {"type": "string", "pattern": "^(?!-)[A-Za-z0-9._:/-]{1,100}$"}
_DURATION: Schema = {
    "description": "Seconds, or a text such as 90s, 30m or 2h; at most 24h.",
    "anyOf": [
        {"type": "number", "minimum": 1, "maximum": 86400},
        {"type": "string", "pattern": "^[0-9]{1,12}([.][0-9]{1,20})?[smhd]?$"},
    ],
}

# As they may be written: on, Off, TRUE.
_SWITCH = "^(" + "|".join("".join(f"[{c.upper()}{c}]" for c in w) for w in document.BOOLEANS) + ")$"
_PROMPT: Schema = {
    "type": "string",
    "pattern": _not_blank(r"\u0000"),
    "description": "What Codex is asked to do.",
}


def _either(pattern: str) -> Schema:
    return {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": pattern}]}


_LIMITS = {
    **_object(
        {
            "memory": _or_null(_either("^[0-9]{1,15}[KMG]?$")),
            "cpu": _or_null(_either("^[0-9]{1,7}%?$")),
            "tasks": _or_null({"type": "integer", "minimum": 1}),
        },
        [],
    ),
    "description": "Only where workers are systemd units.",
}
_VERIFY = {
    **_object(
        {
            "command": _text(1000, "A line for sh(1); exit status 0 says that the task is done."),
            "rounds": _or_null({"type": "integer", "minimum": 1, "maximum": 10, "default": 3}),
        },
        ["command"],
    ),
    "description": "The task's own check, run after each turn.",
}
_KEYS: Mapping[str, Schema] = {
    "session": _text(200, "Tasks of one session run one after another in one thread."),
    "workdir": _PATH,
    "model": _NAME,
    "profile": _NAME,
    "sandbox": {"enum": list(Sandbox), "description": "Not wider than the configured one."},
    "resume": {"enum": list(Resume), "default": "auto"},
    "timeout": _DURATION,
    "idle_timeout": _DURATION,
    "priority": {"type": "integer", "minimum": 0, "maximum": 9, "default": 5},
    "after": {
        "type": "array",
        "maxItems": 50,
        "items": _text(200, "The id or key of a task that must be done first."),
    },
    "not_before": {
        "description": "A time, local to the daemon if it has no zone, or a delay; at most 366d.",
        "anyOf": [{"type": "number", "minimum": 1}, {"type": "string"}],
    },
    "attempts": {"type": "integer", "minimum": 1, "maximum": 20},
    "key": _text(200, "Makes sending the same again harmless."),
    "title": _text(200, "For people."),
    "images": _PATHS,
    "add_dirs": _PATHS,
    "output_schema": _PATH,
    "verify": _VERIFY,
    "limits": _LIMITS,
    "memory": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": _SWITCH}]},
}
REQUEST = _object(
    {"prompt": _PROMPT, **{name: _or_null(schema) for name, schema in _KEYS.items()}}, ["prompt"]
)

LISTED: Mapping[str, Schema] = {
    "id": _ID,
    "state": {"enum": list(State)},
    "outcome": _or_null({"enum": list(Outcome)}),
    "message": _or_null(_STRING),
    "until": _or_null(_TIME),
    "reason": _or_null(_STRING),
    "session": _STRING,
    "title": _or_null(_STRING),
    "file": _or_null(_STRING),
    "key": _or_null(_STRING),
    "retry_of": _or_null(_ID),
    "priority": {"type": "integer", "minimum": 0, "maximum": 9},
    "attempts": _COUNT,
    "created": _or_null(_TIME),
    "started": _or_null(_TIME),
    "ended": _or_null(_TIME),
    "workdir": _or_null(_STRING),
    "thread": _or_null(_STRING),
    "answer_file": _or_null(_STRING),
    "usage": _object({key: _or_null(_COUNT) for key in USAGE_KEYS}),
    "cost": _object({key: _or_null(_NUMBER) for key in COST_KEYS}),
}

SESSION = _object(
    {
        "name": _STRING,
        "thread": _or_null(_STRING),
        "created": _or_null(_TIME),
        "updated": _or_null(_TIME),
        "tasks": _COUNT,
        "usage": {"type": "object", "additionalProperties": _COUNT},
        "live": {"type": "array", "items": _ID},
        "transcript": _or_null(_STRING),
    }
)

_SCHEMAS: Mapping[str, Schema] = {
    "Request": REQUEST,
    "Accepted": _object({"id": _ID, "state": {"enum": list(State)}}),
    "Task": _object({**LISTED, "answer": _or_null(_STRING)}),
    "Listed": _object(LISTED),
    "Tasks": _object({"tasks": {"type": "array", "items": _ref("Listed")}, "next": _or_null(_ID)}),
    "Session": SESSION,
    "Sessions": _object({"sessions": {"type": "array", "items": _ref("Session")}}),
    "Health": {"type": "object", "properties": {"status": _STRING}, "required": ["status"]},
    "Error": _object({"error": _object({"code": _STRING, "message": _STRING})}),
}

# --- operations -------------------------------------------------------------------

_STATUSES = {
    "400": "The request, or the task it asks for, is wrong.",
    "401": "Over TCP: no token, or a wrong one.",
    "403": "The request comes from a web page (it has an Origin).",
    "404": "There is no such task, session or route.",
    "405": "The route does not know this method; Allow names those it knows.",
    "408": "The request was not complete in time.",
    "409": "The key was used for another task.",
    "413": "The body is larger than 1 MiB.",
    "415": "The body is not application/json.",
    "417": "Only Expect: 100-continue is understood.",
    "421": "Host is not localhost, 127.0.0.1 or [::1].",
    "431": "The request line and headers are larger than 32 KiB.",
    "500": "codexd failed; its log says how.",
    "501": "The body is sent with Transfer-Encoding.",
    "503": "Not now: the disk or the queue is full, or too many ask; see Retry-After.",
    "505": "Neither HTTP/1.1 nor HTTP/1.0.",
}
_ALWAYS = frozenset(_STATUSES) - {"404", "409", "415"}


def _content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _operation(
    name: str,
    summary: str,
    status: str,
    content: Schema,
    *errors: str,
    also: tuple[str, ...] = (),
    **more: object,
) -> Schema:
    """`errors` are told as in every operation, the statuses in `also` like `status`."""
    said = sorted(_ALWAYS.union(errors))
    responses: dict[str, object] = {
        code: {"description": _STATUSES[code], "content": _content(_ref("Error"))} for code in said
    }
    for code in (status, *also):
        responses[code] = {"description": summary, "content": content}
    return {"operationId": name, "summary": summary, "responses": responses, **more}


def _parameter(name: str, where: str, schema: Schema, about: str) -> Schema:
    required = {"required": True} if where == "path" else {}
    return {"name": name, "in": where, "schema": schema, "description": about, **required}


_ID_IN_PATH = _parameter("id", "path", _ID, "The task's id.")
_LIST = [
    _parameter("state", "query", {"enum": list(State)}, "Only tasks in this state."),
    _parameter("session", "query", _STRING, "Only tasks of this session."),
    _parameter(
        "limit",
        "query",
        {"type": "integer", "minimum": 1, "maximum": 500, "default": 50},
        "The most tasks to list; there can be fewer although `next` is set.",
    ),
    _parameter("cursor", "query", _ID, "The `next` of the page before."),
]
_WAIT = _parameter(
    "wait",
    "query",
    {"type": "number", "minimum": 0, "maximum": 60},
    "Seconds to wait for the task's end.",
)
_KEY = _parameter(
    "Idempotency-Key", "header", _text(200, "Printable."), "The same as `key` in the body."
)

DOCUMENT: Mapping[str, object] = {
    "openapi": "3.1.0",
    "info": {
        "title": "codexd",
        "version": __version__,
        "description": "Submit tasks for the Codex CLI and read what they came to. "
        "See codexd-http(8).",
    },
    "security": [{}, {"token": []}],
    "paths": {
        "/tasks": {
            "get": _operation(
                "list", "Tasks, newest first.", "200", _content(_ref("Tasks")), parameters=_LIST
            ),
            "post": _operation(
                "submit",
                "The task is durable; a repeat of a key names the first task.",
                "202",
                _content(_ref("Accepted")),
                "409",
                "415",
                parameters=[_KEY],
                requestBody={"required": True, "content": _content(_ref("Request"))},
            ),
        },
        "/tasks/{id}": {
            "get": _operation(
                "show",
                "A task and, once it has ended, its answer.",
                "200",
                _content(_ref("Task")),
                "404",
                parameters=[_ID_IN_PATH, _WAIT],
            )
        },
        "/tasks/{id}/cancel": {
            "post": _operation(
                "cancel",
                "The cancel is durable; the state is the one before it.",
                "202",
                _content(_ref("Accepted")),
                "404",
                "415",
                parameters=[_ID_IN_PATH],
            )
        },
        "/sessions": {
            "get": _operation("sessions", "All sessions.", "200", _content(_ref("Sessions")))
        },
        "/sessions/{name}": {
            "get": _operation(
                "session",
                "A session: its thread, totals and live tasks.",
                "200",
                _content(_ref("Session")),
                "404",
                parameters=[_parameter("name", "path", _STRING, "Percent-encoded.")],
            )
        },
        "/health": {
            "get": _operation(
                "health",
                "Tasks are started.  The same body comes with 503 when they are not.",
                "200",
                _content(_ref("Health")),
                also=("503",),
            )
        },
        "/metrics": {
            "get": _operation(
                "metrics", "Prometheus text.", "200", {"text/plain": {"schema": _STRING}}
            )
        },
        "/openapi.json": {
            "get": _operation("openapi", "This document.", "200", _content({"type": "object"}))
        },
    },
    "components": {
        "schemas": _SCHEMAS,
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    },
}
