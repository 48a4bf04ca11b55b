package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

// ErrNotRunning is the error of a call to an instance that is not there.
var ErrNotRunning = errors.New("not running")

// StatusError is what an instance answers when it does not do what it was
// asked.
type StatusError struct {
	Status int // of HTTP
	Reason string
}

func (e *StatusError) Error() string { return e.Reason }

// maxAnswer bounds what is read of one answer, or of one line of a stream.
const maxAnswer = 64 << 20

// A Client calls one instance.
type Client struct {
	dir, name string
	http      http.Client
}

// NewClient makes a Client of the instance of that name. It connects with
// each call.
func NewClient(dir, name string) *Client {
	c := &Client{dir: dir, name: name}
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", SocketPath(dir, name))
		},
	}
	return c
}

// Get asks for path and decodes the answer into v.
func (c *Client) Get(ctx context.Context, path string, v any) error {
	return c.call(ctx, http.MethodGet, path, v)
}

// Post makes the instance do what path says and decodes the answer into v,
// unless v is nil.
func (c *Client) Post(ctx context.Context, path string, v any) error {
	return c.call(ctx, http.MethodPost, path, v)
}

// Open makes the instance do what path says and returns its answer, whose body
// the caller reads and closes.
func (c *Client) Open(ctx context.Context, path string) (*http.Response, error) {
	return c.do(ctx, http.MethodPost, path)
}

func (c *Client) call(ctx context.Context, method, path string, v any) error {
	answer, err := c.do(ctx, method, path)
	if err != nil {
		return err
	}
	body := answer.Body
	defer body.Close()
	if v == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(v); err != nil {
		return fmt.Errorf("%s: reading its answer: %w", c.name, err)
	}
	return nil
}

// Watch asks for path and gives each value of the answer, raw, to each until
// it returns false. It returns nil then, and io.EOF when the instance ended
// the stream.
func (c *Client) Watch(ctx context.Context, path string, each func(json.RawMessage) bool) error {
	answer, err := c.do(ctx, http.MethodGet, path)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	decoder := json.NewDecoder(answer.Body)
	for {
		var v json.RawMessage
		if err := decoder.Decode(&v); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return io.EOF
		}
		if !each(v) {
			return nil
		}
	}
}

// do returns an answer that is a success.
func (c *Client) do(ctx context.Context, method, path string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://unix"+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(r)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED), // nobody there
		// died before it answered
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%s: %w", c.name, ErrNotRunning)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: %w", SocketPath(c.dir, c.name), fs.ErrPermission)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("%s: %w", c.name, err)
	}
	if response.StatusCode == http.StatusOK {
		return response, nil
	}
	defer response.Body.Close()
	var f failure
	if err := json.NewDecoder(io.LimitReader(response.Body, maxAnswer)).Decode(&f); err != nil ||
		f.Error == "" {
		return nil, fmt.Errorf("%s: answered %s", c.name, response.Status)
	}
	if response.StatusCode == http.StatusForbidden {
		return nil, fmt.Errorf("%s: %w", f.Error, fs.ErrPermission)
	}
	return nil, &StatusError{Status: response.StatusCode, Reason: f.Error}
}

// WaitGone waits until no process holds the lock of the instance.
func (c *Client) WaitGone(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		if running, err := Running(c.dir, c.name); err != nil || !running {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
