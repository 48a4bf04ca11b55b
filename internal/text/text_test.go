package text

import "testing"

func TestOneLine(t *testing.T) {
	if got := OneLine(" a\r\nb\x1b]0;x\x07\u009bc\x7f ä "); got != "a  b ]0;x  c  ä" {
		t.Errorf("got %q", got)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB",
		1536: "1.5 KiB", 5 << 30: "5.0 GiB", 1<<64 - 1: "16.0 EiB"} {
		t.Run(want, func(t *testing.T) {
			if got := Size(n); got != want {
				t.Errorf("Size(%d) = %q, want %q", n, got, want)
			}
		})
	}
}

func TestCounts(t *testing.T) {
	got := Counts(map[string]uint64{"too_big": 12, "no_route": 3, "queue_full": 0})
	if want := "3 no route, 12 too big"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
