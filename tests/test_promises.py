"""Every promise of codexd(7) has tests that would fail if it were broken, and they are there."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent
# How each promise begins, in the manual's order, and what holds it.
PROMISES: dict[str, list[str]] = {
    "An accepted task is not lost": [
        "proof/test_proof.py::test_killed_at_random_moments",
        "proof/test_proof.py::test_the_power_is_cut",
        "proof/test_proof.py::test_a_fault_at_system_calls",
        "test_bad_input.py::test_a_full_disk_holds_all_and_loses_nothing",
    ],
    "No attempt begins twice": [
        "proof/test_proof.py::test_killed_at_random_moments",
        "proof/test_machine.py::test_ledger_dispatch_and_policy_agree_with_a_model",
        "test_main_job.py::test_two_hundred_files_over_twenty_sessions",
        "test_main_job.py::test_kill_everything_three_times_in_the_middle",
    ],
    "Workers that are units go on without the master": [
        "test_survival.py::test_fifty_kills_and_a_restart_of_the_master_do_not_touch_ten_tasks",
        "test_systemd.py::test_workers_outlive_the_master",
        "test_recovery.py::test_the_master_alone_is_killed",
    ],
    "A task is done only with the evidence above": [
        "test_recovery.py::test_a_turn_without_a_result_is_judged_as_its_worker_would",
        "test_recovery.py::test_a_result_without_a_known_outcome_is_not_done",
        "test_verify.py::test_a_killed_worker_has_not_verified",
    ],
    "A turn whose result is on disk is not asked for again": [
        "test_recovery.py::test_everything_is_killed",
        "test_recovery.py::test_every_moment_of_a_crash",
        "test_recovery.py::test_interrupted_again_and_again_a_task_has_failed",
        "test_survival.py::test_the_host_goes_down_in_mid_task",
    ],
    "One bad file harms only itself": [
        "test_bad_input.py::test_every_good_file_beside_a_bad_one_is_answered",
        "test_bad_input.py::test_a_state_that_cannot_be_used",
        "proof/test_state_files.py::test_anything_in_the_place_of_a_file",
        "proof/test_generated.py::test_a_daemon_starts_on_any_state",
    ],
    "A dropped file is seen within six seconds": [
        "proof/test_limits.py::test_without_inotify",
        "proof/test_limits.py::test_another_inbox_in_its_place",
        "proof/test_limits.py::test_a_flood_while_nobody_watches",
    ],
    "A clock that jumps changes the times in files": [
        "proof/test_limits.py::test_a_clock_that_is_set",
        "proof/test_limits.py::test_a_host_that_slept",
        "proof/test_limits.py::test_a_wait_across_a_restart",
        "test_waits.py::test_a_time_is_what_the_clock_shows",
    ],
    "Every task ends": [
        "proof/test_month.py::test_a_month_in_minutes",
        "proof/test_proof.py::test_mixed_load_for_a_while",
        "proof/test_load.py::test_ten_thousand_and_a_thousand",
    ],
    "Only the master writes the ledger": [
        "test_layers.py::test_imports_only_point_up",
        "test_rotation.py::test_a_reader_beside_a_writer_that_rotates_sees_every_event_once",
        "test_http.py::test_slow_clients_harm_only_themselves",
        "test_hostile.py::test_without_a_sandbox_the_unit_still_holds",
    ],
    "No lock is left that somebody has to remove": [
        "test_lock.py::test_one_holder_and_none_after_it_was_killed",
        "test_processes.py::test_locks_that_nobody_holds_are_cleared_away",
    ],
    "No login, key or token is in the ledger": [
        "test_hostile.py::test_the_journal_and_the_state_have_no_secret",
        "test_hostile.py::test_a_turn_in_the_sandbox_finds_and_does_nothing",
        "test_profile.py::test_a_hostile_turn_finds_and_writes_nothing",
    ],
    "Nobody can submit, cancel or read but those": [
        "test_systemd.py::test_another_user_may_nothing",
        "test_systemd.py::test_a_member_may_not_take_away_what_others_dropped",
        "test_http.py::test_over_tcp_every_request_needs_the_token",
        "test_http.py::test_the_socket_is_for_the_group",
    ],
    "Nothing is refused, held or given up in silence": [
        "test_bad_input.py::test_a_bad_file_is_kept_with_the_reason",
        "test_cli.py::test_status_tells_what_has_to_be_mended",
        "proof/test_generated.py::test_every_door",
    ],
}


def promised() -> list[str]:
    """Each item of the section, as one line of words."""
    page = (HERE.parent / "man" / "codexd.7").read_text()
    section = page.partition("\n.Sh PROMISES\n")[2].partition("\n.Sh ")[0]
    items = section.partition(".Bl -enum\n.It\n")[2].split("\n.It\n")
    return [" ".join(item.split()) for item in items]


def test_every_promise_is_held() -> None:
    found = promised()
    assert len(found) == len(PROMISES)
    for said, begins in zip(found, PROMISES, strict=True):
        assert said.startswith(begins)


def test_what_holds_them_is_there() -> None:
    every = [test for tests in PROMISES.values() for test in tests]
    defined = {
        f"{name}::{one.name}"
        for name in {test.partition("::")[0] for test in every}
        for one in ast.parse((HERE / name).read_text()).body
        if isinstance(one, ast.FunctionDef)
    }
    assert set(every) <= defined, set(every) - defined
