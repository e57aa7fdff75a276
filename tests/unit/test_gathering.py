"""When does a round close? Each rule of the page, one by one."""

import pytest

from orchestrator.gathering import Decision, Gathering, Member

NOW = 100.0


def gathering(quorum: int = 2, sites: str = "abc", deadline: float = 200.0) -> Gathering:
    return Gathering(quorum, deadline, 10.0, {site: Member() for site in sites})


def kind(machine: Gathering, now: float = NOW) -> str:
    return machine.decide(now).kind


def test_it_waits_for_the_first_answer_until_the_deadline() -> None:
    assert gathering().decide(NOW) == Decision("wait", "", 200.0)


def test_it_closes_when_every_site_answered() -> None:
    machine = gathering().counted("a").counted("b")
    assert kind(machine) == "wait"
    assert machine.counted("c").decide(NOW) == Decision("close", "every site answered")
    assert kind(machine.failed("c", "NaN in w")) == "close"


def test_a_quorum_waits_for_a_site_that_is_here() -> None:
    machine = gathering(quorum=1).counted("a").gone("b", NOW)
    assert kind(machine, 199.9) == "wait"
    assert machine.decide(NOW).wake_at == 200.0


def test_a_quorum_waits_for_gone_sites_as_long_as_the_grace() -> None:
    machine = gathering().counted("a").counted("b").gone("c", NOW)
    assert machine.decide(NOW) == Decision("wait", "", 110.0)
    assert kind(machine, 109.9) == "wait"
    assert kind(machine, 110.0) == "close"


def test_the_grace_begins_with_the_last_that_went() -> None:
    machine = gathering(quorum=1).counted("a").gone("b", NOW).gone("c", NOW + 5)
    assert machine.decide(NOW + 10).wake_at == 115.0
    assert kind(machine, 115.0) == "close"


def test_the_grace_begins_once_however_often_it_is_said() -> None:
    machine = gathering().counted("a").counted("b").gone("c", NOW).gone("c", NOW + 9)
    assert kind(machine, 110.0) == "close"


def test_who_comes_back_is_waited_for_again() -> None:
    machine = gathering().counted("a").counted("b").gone("c", NOW).back("c")
    assert kind(machine, 150.0) == "wait"
    machine = machine.gone("c", 150.0)
    assert machine.decide(150.0).wake_at == 160.0


def test_the_grace_ends_at_the_deadline() -> None:
    machine = gathering().counted("a").counted("b").gone("c", 195.0)
    assert machine.decide(195.0).wake_at == 200.0
    assert kind(machine, 200.0) == "close"


def test_gone_sites_do_not_close_below_the_quorum() -> None:
    machine = gathering().counted("a").gone("b", 0.0).gone("c", 0.0)
    assert kind(machine) == "wait"
    assert kind(machine, 200.0) == "abandon"


def test_the_deadline_closes_with_the_quorum_and_abandons_without() -> None:
    machine = gathering().counted("a")
    decision = machine.decide(200.0)
    assert decision.kind == "abandon"
    assert "quorum of 2" in decision.reason
    assert "b: did not answer in time" in decision.reason
    assert machine.counted("b").decide(200.0) == Decision("close", "the deadline passed")


def test_everything_counted_at_the_deadline_is_every_site_answered() -> None:
    assert gathering(1, "a").counted("a").decide(500.0).reason == "every site answered"


def test_quorum_of_all_waits_for_a_gone_site_until_the_deadline() -> None:
    machine = gathering(quorum=3).counted("a").counted("b").gone("c", 0.0)
    assert machine.decide(NOW) == Decision("wait", "", 200.0)
    assert kind(machine.back("c").counted("c")) == "close"
    assert kind(machine, 200.0) == "abandon"


def test_quorum_of_all_is_lost_with_one_failure() -> None:
    decision = gathering(quorum=3).failed("c", "site c, tensor w: it holds NaN").decide(NOW)
    assert decision.kind == "abandon"
    assert "can't be reached any more" in decision.reason
    assert "c: site c, tensor w: it holds NaN" in decision.reason


def test_it_is_given_up_as_soon_as_the_quorum_is_out_of_reach() -> None:
    machine = gathering().failed("a", "no")
    assert kind(machine) == "wait"
    assert kind(machine.failed("b", "no")) == "abandon"


def test_a_contribution_counts_once() -> None:
    machine = gathering().counted("a").counted("a")
    assert machine.counted_sites == ("a",)
    assert kind(machine) == "wait"


@pytest.mark.parametrize("later", ["failed", "gone", "back"])
def test_what_is_counted_stays_counted(later: str) -> None:
    machine = gathering().counted("a")
    after = {
        "failed": machine.failed("a", "died"),
        "gone": machine.gone("a", NOW),
        "back": machine.back("a"),
    }[later]
    assert after.counted_sites == ("a",)
    assert "a" not in after.missing


def test_work_that_arrives_after_a_failure_counts() -> None:
    machine = gathering().failed("a", "the trainer died").counted("a")
    assert machine.counted_sites == ("a",)
    assert machine.members["a"].reason == ""


def test_strangers_change_nothing() -> None:
    machine = gathering()
    for after in (
        machine.counted("x"),
        machine.failed("x", "y"),
        machine.gone("x", NOW),
        machine.back("x"),
    ):
        assert after == machine


def test_missing_sites_are_named_with_what_is_known() -> None:
    machine = gathering(sites="abcd").counted("a").failed("b", "NaN in w").gone("c", NOW)
    assert machine.missing == {"b": "NaN in w", "c": "gone", "d": "did not answer in time"}


def test_nobody_to_wait_for() -> None:
    assert kind(gathering(quorum=1, sites="")) == "abandon"


# -- preparing ------------------------------------------------------------------------------------


def patient(**leads: float) -> Gathering:
    """A deadline at 200, and up to 50 seconds of preparing that do not count."""
    members = {site: Member(lead_s=leads.get(site)) for site in "abc"}
    return Gathering(1, 200.0, 10.0, members, 50.0)


def test_preparing_does_not_run_against_a_site() -> None:
    machine = patient().counted("a").counted("b").prepares("c", 100.0, still=True)
    machine = machine.prepares("c", 130.0, still=False)
    assert machine.decide(200.0) == Decision("wait", "", 230.0)
    assert machine.decide(230.0) == Decision("close", "the deadline passed")


def test_who_still_prepares_at_the_deadline_is_waited_for_up_to_a_bound() -> None:
    machine = patient().counted("a").counted("b").prepares("c", 190.0, still=True)
    assert machine.decide(200.0) == Decision("wait", "", 250.0)
    assert kind(machine, 250.0) == "close"
    assert machine.prepares("c", 215.0, still=False).decide(215.0).wake_at == 225.0


def test_who_begins_to_prepare_behind_its_deadline_is_too_late() -> None:
    machine = patient().prepares("a", 0.0, True).prepares("a", 10.0, False)
    assert kind(machine.counted("b").counted("c").prepares("a", 210.0, True), 210.0) == "close"


def test_the_site_knows_what_a_restart_forgot() -> None:
    machine = patient().counted("a").counted("b").prepares("c", 150.0, False, said_s=40.0)
    assert machine.decide(200.0).wake_at == 240.0
    assert machine.prepares("c", 160.0, False, said_s=3.0) == machine  # it began anew
    assert machine.prepares("c", 160.0, False, said_s=1e9).decide(200.0).wake_at == 250.0


def test_who_is_gone_does_not_prepare() -> None:
    machine = patient().counted("a").counted("b").prepares("c", 100.0, True).gone("c", 105.0)
    assert machine.members["c"].prepared_s == 5.0
    assert machine.prepares("c", 106.0, True).members["c"].preparing_since is None
    assert kind(machine, 115.0) == "close"  # the grace, as of anybody


def test_others_come_in_time_while_one_is_waited_for() -> None:
    machine = patient().counted("a").prepares("c", 0.0, True).prepares("c", 20.0, False)
    assert kind(machine, 210.0) == "wait"
    assert kind(machine.counted("b").counted("c"), 210.0) == "close"
    gone = machine.gone("c", 205.0)
    assert gone.decide(206.0).wake_at == 215.0  # b's time is over, c's grace is not
    assert kind(gone, 215.0) == "close"


# -- partial work ---------------------------------------------------------------------------------


def test_a_site_is_told_once_to_finish_before_its_deadline() -> None:
    machine = patient(a=30.0, b=20.0)
    assert machine.decide(169.0) == Decision("wait", "", 170.0)
    decision = machine.decide(170.0)
    assert (decision.kind, decision.finish) == ("wait", ("a",))
    machine = machine.told(decision.finish)
    assert machine.decide(170.0) == Decision("wait", "", 180.0)
    assert machine.decide(185.0).finish == ("b",)
    assert machine.told(("b",)).decide(185.0) == Decision("wait", "", 200.0)


def test_who_comes_back_is_told_again_and_who_is_gone_is_not() -> None:
    machine = patient(a=30.0).told(("a",))
    assert machine.back("a").decide(175.0).finish == ("a",)
    assert patient(a=30.0).gone("a", 100.0).decide(175.0).finish == ()


@pytest.mark.parametrize("answer", ["counted", "failed"])
def test_who_has_answered_has_nothing_to_finish(answer: str) -> None:
    machine = patient(a=30.0)
    done = machine.counted("a") if answer == "counted" else machine.failed("a", "died")
    assert done.decide(175.0).finish == ()


def test_preparing_puts_off_when_a_site_is_told() -> None:
    machine = patient(a=30.0).prepares("a", 0.0, True).prepares("a", 12.0, False)
    assert machine.decide(170.0) == Decision("wait", "", 182.0)
    assert machine.decide(182.0).finish == ("a",)
