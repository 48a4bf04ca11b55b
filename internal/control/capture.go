package control

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"masquevpn/internal/capture"
)

// The paths of captures, the parameters of a request, and the fields of the
// response.
const (
	capturePath = "/v1/capture"

	paramSession = "session"
	paramSnapLen = "snaplen"
	paramCount   = "count"

	captureID       = "Capture-Id"
	captureCaptured = "Capture-Captured" // trailer
	captureDropped  = "Capture-Dropped"  // trailer
)

func captureStopPath(id string) string { return capturePath + "/" + id + "/stop" }

// maxCaptures is the maximum number of simultaneous captures by one control
// socket.
const maxCaptures = 8

// captures serves captures on a control socket.
type captures struct {
	tap     *capture.Tap
	session func(id string) (ends <-chan struct{}, err error)
	ended   <-chan struct{}
	logger  *slog.Logger

	mu     sync.Mutex // guards the fields below
	lastID int
	stop   map[string]context.CancelFunc // running captures by ID
}

// HandleCaptures makes mux serve captures of the packets that pass tap. session
// returns a channel that is closed when the session ends, or an error if there
// is no such session. It is nil for a program without several sessions. All
// captures end when ended is closed.
func HandleCaptures(mux *http.ServeMux, tap *capture.Tap,
	session func(id string) (<-chan struct{}, error), ended <-chan struct{}, logger *slog.Logger) {
	c := &captures{tap: tap, session: session, ended: ended, logger: logger,
		stop: make(map[string]context.CancelFunc)}
	mux.HandleFunc("POST "+capturePath, c.serve)
	mux.HandleFunc("POST "+captureStopPath("{id}"), func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		stop := c.stop[r.PathValue("id")]
		c.mu.Unlock()
		if stop != nil { // else the capture has ended already
			stop()
		}
		Reply(w, struct{}{})
	})
}

func (c *captures) serve(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	o := capture.Options{Session: q.Get(paramSession)}
	var err error
	if s := q.Get(paramSnapLen); s != "" {
		o.SnapLen, err = strconv.Atoi(s)
	}
	if s := q.Get(paramCount); s != "" && err == nil {
		o.Count, err = strconv.ParseUint(s, 10, 64)
	}
	if err != nil {
		Fail(w, http.StatusUnprocessableEntity, err)
		return
	}
	var ends <-chan struct{} // closed when the session ends; nil: all sessions
	if o.Session != "" {
		if ends, err = c.session(o.Session); err != nil {
			Fail(w, http.StatusNotFound, err)
			return
		}
	}
	ctx, stop := context.WithCancel(r.Context())
	defer stop()
	c.mu.Lock()
	if len(c.stop) >= maxCaptures {
		c.mu.Unlock()
		Fail(w, http.StatusServiceUnavailable,
			fmt.Errorf("%d captures are running already", maxCaptures))
		return
	}
	c.lastID++
	id := strconv.Itoa(c.lastID)
	c.stop[id] = stop
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.stop, id)
		c.mu.Unlock()
	}()
	go func() {
		select {
		case <-ends:
		case <-c.ended:
		case <-ctx.Done():
		}
		stop()
	}()

	h := w.Header()
	h.Set("Content-Type", "application/vnd.tcpdump.pcap")
	h.Set(captureID, id)
	h.Add("Trailer", captureCaptured)
	h.Add("Trailer", captureDropped)
	running := c.tap.Start(o)
	c.logger.Info("packets inside the tunnel are captured by the operator", "session", o.Session)
	_ = running.Write(ctx, flushed{w, http.NewResponseController(w)}) // the client may be gone
	captured, dropped := running.Counts()
	c.logger.Info("capture ended", "session", o.Session, "captured", captured, "dropped", dropped)
	h.Set(captureCaptured, strconv.FormatUint(captured, 10))
	h.Set(captureDropped, strconv.FormatUint(dropped, 10))
}

// flushed sends each part of a response at once.
type flushed struct {
	w     io.Writer
	flush *http.ResponseController
}

func (f flushed) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = f.flush.Flush()
	}
	return n, err
}

// Capture is a running capture of an instance.
type Capture struct {
	// Body is the pcap file. The caller must close it.
	Body io.ReadCloser

	client *Client
	answer *http.Response
}

// Capture starts a capture. An empty session in o stands for all sessions.
func (c *Client) Capture(ctx context.Context, o capture.Options) (*Capture, error) {
	q := url.Values{paramSession: {o.Session}, paramSnapLen: {strconv.Itoa(o.SnapLen)},
		paramCount: {strconv.FormatUint(o.Count, 10)}}
	answer, err := c.do(ctx, http.MethodPost, capturePath+"?"+q.Encode())
	if err != nil {
		return nil, err
	}
	return &Capture{Body: answer.Body, client: c, answer: answer}, nil
}

// Stop makes the instance end the capture. Body then ends after the packets
// that it has captured.
func (c *Capture) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return c.client.Post(ctx, captureStopPath(c.answer.Header.Get(captureID)), nil)
}

// Counts returns the numbers of captured packets and of packets that were
// dropped because they could not be written in time. Body must have been read
// to its end.
func (c *Capture) Counts() (captured, dropped string) {
	return c.answer.Trailer.Get(captureCaptured), c.answer.Trailer.Get(captureDropped)
}
