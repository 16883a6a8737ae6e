"""A watch on acceptance: MTP weights that are lost or misread cost speed, and nothing fails."""

from collections.abc import Callable

VERIFIED = 200  # first drafts of a step, after which the watch says what it saw
FEW = 4  # accepted ones: a text that is hard to foresee has ten times as many


class Watch:
    """Reports once, if nearly no draft was accepted."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.verified = self.accepted = 0

    def see(self, drafted: int, accepted: int) -> None:
        """A row drafted so many tokens in a step, of which so many were accepted."""
        if not drafted or self.verified == VERIFIED:
            return
        self.verified += 1
        self.accepted += accepted > 0
        if self.verified == VERIFIED and self.accepted <= FEW:
            self.report(
                f"MTP: {self.accepted} of the first {self.verified} drafts were accepted. The "
                f"answers are right, but drafts only cost time. Likely the checkpoint's mtp.* "
                f"weights are lost, of another model, or in another format than their files say; "
                f"compare with the released checkpoint, or serve without MTP"
            )
