"""What the documents say in words, as JSON Schema has none for it."""

import schemathesis

SIZES = ("min", "startup", "max")
LONGEST_WAIT_MS = 200


@schemathesis.hook
def map_case(context, case):
    """In what is to be accepted, min <= startup <= max, and nobody waits for room for long."""
    if case.meta is not None and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        limits = case.body.get("limits", case.body)
        if isinstance(limits, dict) and all(name in limits for name in SIZES):
            limits.update(zip(SIZES, sorted(limits[name] for name in SIZES)))
        if case.path.endswith("/reservations"):
            wait = case.body.get("wait_ms")
            case.body["wait_ms"] = LONGEST_WAIT_MS if wait is None else min(wait, LONGEST_WAIT_MS)
    return case
