"""The message ids of the log: what the journal knows each event by.

One for each event that a program logs, for ever: journalctl finds the event by
it, and systemd/codexd.catalog has what `journalctl -x` explains.  A new event
gets a new one (`systemd-id128 new`); an id is never given to another event.

A table of constants; it imports nothing.
"""

IDS: dict[str, str] = {
    "already.served": "77bc0c32a6ba41e88e88e063e9505c3f",
    "attempt.begun": "bee86d2c4f9d445080352b40d137f395",
    "attempt.ended": "8fd6950486594023ae68099d25294c39",
    "cannot.go.on": "070b03571bf84ead805a1e1e360587ba",
    "cannot.listen": "09520400002048e3b5ac885d8deca761",
    "codex.config": "3fb0af7ae971475b89b0c9cbcb225376",
    "codex.found": "8aff8e37fc154c65a609d5892700a8f2",
    "codex.profile": "c59ef7009bad428fad49803b692d462b",
    "config.loaded": "defb2d8097cc41188e1dd49bb267bb19",
    "config.refused": "eb350ed8d8be499995df8c2348ad1e4c",
    "configuration": "9352adab9876428bbe165cd31f5f72b8",
    "gate.closed": "1e54563723814727a691ecc7258196ea",
    "gate.opened": "1e191d2429d24d63b84519fc416379d6",
    "host.refuses": "9250aa3dc9244c1f9d0b45640f47ded5",
    "http.died": "a546acbffdb1444a98bab36727574774",
    "http.failed": "63ca07e3301b4646b43d785d4cf91f02",
    "http.loop": "86c344fdc51040bd87c1273e448a2925",
    "http.off": "7297fe49bfe549749c71efeed8a8d06b",
    "http.post": "3a2ba1b6ec4d4ca98e7f0684ff5b15fe",
    "ledger.damaged": "6b82545beca447a2aee5245b6d855d20",
    "ledger.torn": "c1f55576187e49b69eced627f03c1302",
    "no.permission": "4655a96c916845289341721f747f24f0",
    "not.ours": "d7ea80587f064a1db31547a264baffc3",
    "not.tidied": "f3f723cb4f94412fae0847ecdc3749d1",
    "rejected": "02b69574668b4460b082e64cd4baed3f",
    "repeated": "5140b65cbacc45ce8a083ed9af8ac8f4",
    "reset": "ac2413ab15594c3e985781e432a58806",
    "retention.refused": "d378fd3164284e10abe92ada00571bba",
    "retention.removed": "0f1e12fb4cf842a48d9554440b03390c",
    "schedule.delivered": "ef655327611546bf81ae124765496211",
    "schedule.refused": "b8789b46cbab4e259fd99c9e14dc23f3",
    "schedule.skipped": "1a6fbf7df3854a8ea2db37a57d400a8e",
    "session.damaged": "d6ca66d7f7d245c0a1b9c30d5e6279f9",
    "started": "09c8132b27724394bd2281d48301e38c",
    "stopped": "a55fc232b89940dd8d502db6fbd56099",
    "task.cancelled": "07c6e60b0b6049d5819fb6e31f29314e",
    "task.done": "a3698b200f5d4fb38f57ef4ca70a68ec",
    "task.failed": "a310e3d7a3bc4d6782bb13c08d374cb3",
    "task.queued": "c761346582d24a1a860d72f349c9bd1f",
    "task.running": "35bbf8e7748342f59c074c304b772a25",
    "task.stopping": "a0bb062a8ac444df8215a333c650d100",
    "task.unknown": "13f3e50062f34948b92a9be3af59ec38",
    "task.waiting": "5fb2ec73f37d4f77878839bc461acc30",
    "usage.damaged": "f51b758c5b894421a1372666d2782a36",
    "worker.refused": "0adef037c8a54808b4f4cbce0f138f86",
}
