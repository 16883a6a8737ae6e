"""A watch on acceptance: lost or misread MTP weights cost speed, and cause no error."""

from collections.abc import Callable

# First drafts that the watch sees. Adaptive lengths make few of them if drafts are rejected, so it
# reports as early as it can be sure: after NONE rejected ones, and MORE for each
# accepted one. Released checkpoints accept over 0.3; at 0.3 the chance of a report is below 1e-7,
# at 0.15 below 1e-3 (binomial).
NONE, MORE, FEW = 48, 38, 4
VERIFIED = NONE + FEW * MORE  # 200
REQUESTS = 4  # before VERIFIED: one answer may be random text, such as hashes


class Watch:
    """Reports once, if nearly no draft was accepted."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.verified = self.accepted = 0
        self.requests: set[str] = set()
        self.ended = False

    def see(self, request: str, drafted: int, accepted: int) -> None:
        """A row drafted `drafted` tokens in a step, of which `accepted` were accepted."""
        if not drafted or self.ended:
            return
        self.verified += 1
        self.accepted += accepted > 0
        self.requests.add(request)
        certain = self.verified >= NONE + MORE * self.accepted
        if certain and (len(self.requests) >= REQUESTS or self.verified >= VERIFIED):
            self._end()
            self.report(
                f"MTP: {self.accepted} of the first {self.verified} drafts were accepted. The "
                f"answers are right, but drafts only cost time. Likely the checkpoint's mtp.* "
                f"weights are lost, of another model, or in another format than their files say; "
                f"compare with the released checkpoint, or serve without MTP"
            )
        elif self.accepted > FEW:
            self._end()

    def _end(self) -> None:
        self.ended = True
        self.requests.clear()
