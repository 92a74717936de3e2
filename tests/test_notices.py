"""Notices of EC2's that an instance goes, from a metadata service that is played on loopback."""

import threading
from collections.abc import Mapping

import pytest
from metadata import metadata_service
from waiting import wait_for

from raynium.health.notices import Notice, NoticeWatch, ask_for_notices

pytestmark = pytest.mark.quick

# As EC2's guide shows them (Spot instance interruption notices, rebalance recommendations, scheduled events).
PAGES = {
    "/latest/meta-data/spot/instance-action": '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}',
    "/latest/meta-data/events/recommendations/rebalance": '{"noticeTime": "2020-10-27T08:22:00Z"}',
    "/latest/meta-data/events/maintenance/scheduled": """[
        {"NotBefore": "21 Jan 2019 09:00:43 GMT", "Code": "system-reboot", "Description": "scheduled reboot",
         "EventId": "instance-event-0d59937288b749b32", "NotAfter": "21 Jan 2019 09:17:23 GMT", "State": "active"},
        {"NotBefore": "20 Jan 2019 09:00:43 GMT", "Code": "system-reboot", "State": "canceled"}]""",
}
SPOT = Notice("EC2 will terminate this spot instance", 1505722920.0)
REBOOT = Notice("EC2 has scheduled system-reboot for this instance", 1548061243.0)
LEAVE = Notice("EC2 recommends to leave this spot instance", None)


def test_the_three_kinds_are_read_with_their_times_and_cancelled_ones_are_none() -> None:
    with metadata_service(pages=PAGES) as address:
        assert ask_for_notices(address) == [SPOT, REBOOT, LEAVE]
    assert str(SPOT) == "EC2 will terminate this spot instance at 2017-09-18 08:22:00 UTC"
    assert str(LEAVE) == "EC2 recommends to leave this spot instance"


def test_an_instance_that_stays_has_none_and_outside_of_ec2_nobody_is_asked_again() -> None:
    with metadata_service(pages={}) as address:
        assert ask_for_notices(address) == []
    assert ask_for_notices(address) is None
    asked: list[None] = []
    watch = NoticeWatch(lambda: asked.append(None), lambda notice: None, lambda: None, poll_seconds=0.001)
    watch._thread.join(10)
    assert len(asked) == 1
    watch.close()


def test_a_notice_is_told_at_each_poll_while_it_stands_and_a_page_that_cannot_be_read_hides_no_other() -> None:
    pages: dict[str, str] = {}
    told: list[Notice] = []
    asked = threading.Semaphore(0)

    def ask(address: str, pages: Mapping[str, str]) -> list[Notice] | None:
        asked.release()
        return ask_for_notices(address)

    with metadata_service(pages=pages) as address:
        watch = NoticeWatch(lambda: ask(address, pages), told.append, lambda: None, poll_seconds=0.01)
        asked.acquire()
        pages["/latest/meta-data/spot/instance-action"] = "tomorrow"
        for _ in range(3):
            asked.acquire()
        assert told == []
        pages |= PAGES
        wait_for(lambda: told.count(SPOT) > 1 and told.count(LEAVE) > 1)
        for _ in range(3):
            asked.acquire()
        watch.close()
    assert told[:3] == [SPOT, REBOOT, LEAVE]


@pytest.mark.parametrize("page", ["tomorrow", '["a list of words"]', '[{"State": "active"}]', "{}x"])
def test_a_maintenance_page_in_other_words_does_not_hide_the_spot_notice_of_the_same_round(page: str) -> None:
    with metadata_service(pages=PAGES | {"/latest/meta-data/events/maintenance/scheduled": page}) as address:
        assert ask_for_notices(address) == [SPOT, LEAVE]


def test_a_poll_without_an_answer_does_not_end_a_watch_that_was_answered_before() -> None:
    answers: list[list[Notice] | None] = [[], None, None, [SPOT]]
    told: list[Notice] = []
    watch = NoticeWatch(lambda: answers.pop(0) if answers else None, told.append, lambda: None, poll_seconds=0.001)
    wait_for(lambda: bool(told))
    watch.close()
    assert told == [SPOT]


def test_a_notice_that_stands_no_more_is_told_to_be_withdrawn_once_and_not_for_a_page_that_was_missing() -> None:
    answers: list[list[Notice] | None] = [[], [REBOOT], [], None, [], [REBOOT], [], None, [], [], [], []]
    told: list[Notice | None] = []
    watch = NoticeWatch(
        lambda: answers.pop(0) if answers else None, told.append, lambda: told.append(None), poll_seconds=0.001
    )
    wait_for(lambda: not answers)
    watch.close()
    assert told == [REBOOT, REBOOT, None]
