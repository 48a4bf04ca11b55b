package capsule

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"testing"
	"testing/iotest"

	"github.com/quic-go/quic-go/quicvarint"
)

// vector is an entry of testdata/capsules.json.
type vector struct {
	ID  string
	Hex string
	Why string // reason for the verdict

	// Verdict is "ok", "malformed", or "policy" if the receiver may choose.
	Verdict string

	// Fin means that the stream ends after the capsule.
	Fin bool
}

func (v vector) bytes(t testing.TB) []byte {
	t.Helper()
	b, err := hex.DecodeString(v.Hex)
	if err != nil {
		t.Fatalf("%s: %v", v.ID, err)
	}
	return b
}

func readVectors(t testing.TB) []vector {
	t.Helper()
	b, err := os.ReadFile("testdata/capsules.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(b, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) == 0 {
		t.Fatal("no vectors")
	}
	return vectors
}

// errOpen ends a stream in tests that must not see io.EOF, because a real one
// would be waiting for more bytes.
var errOpen = errors.New("the stream is still open")

// stream returns a stream with the vector's bytes, followed by io.EOF or
// errOpen.
func (v vector) stream(t testing.TB) io.Reader {
	r := io.Reader(bytes.NewReader(v.bytes(t)))
	if !v.Fin {
		r = io.MultiReader(r, iotest.ErrReader(errOpen))
	}
	return r
}

func TestVectors(t *testing.T) {
	// policy has this package's verdict on vectors that leave a choice.
	policy := map[string]string{
		"AR10": "malformed",
		"RA10": "malformed",
		"DG3":  "ok",
		"DN4":  "ok",         // the draft's own example; see DNSAssign.Validate
		"PF7":  "normalized", // bits below the prefix are cleared
	}
	for _, v := range readVectors(t) {
		t.Run(v.ID, func(t *testing.T) {
			verdict := v.Verdict
			if verdict == "policy" {
				verdict = policy[v.ID]
			}
			r := NewReader(v.stream(t), 1<<10)
			skipped := false
			r.Skipped = func(Type) { skipped = true }
			c, err := r.Next()
			switch verdict {
			case "ok", "normalized":
				if err != nil {
					t.Fatalf("%s: %v", v.Why, err)
				}
				got, want := c.Append(nil), v.bytes(t)
				same := bytes.HasSuffix(want, got) && (skipped || len(got) == len(want))
				if same != (verdict == "ok") {
					t.Errorf("encoded again %x, received %x", got, want)
				}
				if _, err := r.Next(); !errors.Is(err, errOpen) {
					t.Errorf("after the capsule: %v, want errOpen", err)
				}
			case "malformed":
				if !errors.Is(err, ErrMalformed) {
					t.Fatalf("%s: got %v, %v, want ErrMalformed", v.Why, c, err)
				}
				if e, ok := errors.AsType[*Error](err); !ok {
					t.Errorf("%v is a %T, not an *Error", err, err)
				} else if want, _, _ := quicvarint.Parse(v.bytes(t)); e.Type != Type(want) {
					t.Errorf("%v: capsule type %d, want %d", e, e.Type, want)
				}
			default:
				t.Fatalf("unknown verdict %q", v.Verdict)
			}
		})
	}
}
