package harness

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
)

const (
	memoryChunk = 1 << 20
	pageSize    = 4096
)

// Memory looks through everything that the process can read in its own memory:
// more than a core dump has, since what is marked to be left out of one
// (MADV_DONTDUMP) is read here too. The process is stopped while its memory is
// copied. A page that the kernel does not give out (a device's, the vvar page) is
// passed over.
func (s *Scanner) Memory(ctx context.Context, p Process) ([]Finding, Scanned, error) {
	pieces, err := copyMemory(ctx, p)
	if err != nil {
		return nil, Scanned{}, err
	}
	var n Scanned
	var found []Finding
	for _, piece := range pieces {
		n.Files++
		n.Bytes += int64(len(piece.b))
		found = append(found, s.Bytes(fmt.Sprintf("the memory of %s from %#x on (%s)", p.Name, piece.at, piece.what), piece.b)...)
	}
	return found, n, nil
}

// copyMemory returns the memory of a process in pieces without gaps.
func copyMemory(ctx context.Context, p Process) (pieces []memoryPiece, err error) {
	if err := p.Pause(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.Resume()) }()
	ranges, err := readable(p.PID)
	if err != nil {
		return nil, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", p.PID))
	if err != nil {
		return nil, fmt.Errorf("read the memory of %s: %w", p.Name, err)
	}
	defer mem.Close()
	for _, r := range ranges {
		if pieces, err = r.read(mem, pieces); err != nil {
			return nil, fmt.Errorf("read the memory of %s: %w", p.Name, err)
		}
	}
	return pieces, nil
}

// memoryPiece is a stretch of memory in which no page is all zero.
type memoryPiece struct {
	at   int64
	what string
	b    []byte
}

// memoryRange is a mapping of a process as in proc(5).
type memoryRange struct {
	from, to int64
	what     string // path, [heap], [stack], or nothing for anonymous memory
}

// readable lists the mappings that the process itself may read.
func readable(pid int) ([]memoryRange, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []memoryRange
	for l := bufio.NewScanner(f); l.Scan(); {
		fields := strings.Fields(l.Text())
		var r memoryRange
		if len(fields) < 5 {
			return nil, fmt.Errorf("/proc/%d/maps is not understood", pid)
		}
		if fields[1][0] != 'r' {
			continue
		}
		if len(fields) > 5 {
			r.what = strings.Join(fields[5:], " ")
		}
		switch r.what {
		case "[vvar]", "[vvar_vclock]", "[vsyscall]": // the kernel's own
			continue
		}
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &r.from, &r.to); err != nil {
			return nil, fmt.Errorf("/proc/%d/maps is not understood: %w", pid, err)
		}
		out = append(out, r)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("process %d shows no memory", pid)
	}
	return out, nil
}

// read appends the mapping's pieces. Pages of zeros end a piece, as do those that
// are not given out: no secret lies across them.
func (r memoryRange) read(mem *os.File, pieces []memoryPiece) ([]memoryPiece, error) {
	what := r.what
	if what == "" {
		what = "anonymous"
	}
	buf := make([]byte, memoryChunk)
	open := false // the last piece goes on
	for at := r.from; at < r.to; {
		got, err := mem.ReadAt(buf[:min(memoryChunk, r.to-at)], at)
		if err != nil && !errors.Is(err, io.EOF) && !refusedPage(err) {
			return nil, fmt.Errorf("at %#x (%s): %w", at, what, err)
		}
		for page := range slices.Chunk(buf[:got], pageSize) {
			if bytes.Equal(page, zeroPage[:len(page)]) {
				open = false
			} else if open {
				last := &pieces[len(pieces)-1]
				last.b = append(last.b, page...)
			} else {
				pieces, open = append(pieces, memoryPiece{at, what, bytes.Clone(page)}), true
			}
			at += int64(len(page))
		}
		if err != nil { // pass over one page that is not given out
			at, open = (at/pageSize+1)*pageSize, false
		}
	}
	return pieces, nil
}

var zeroPage [pageSize]byte

func refusedPage(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EFAULT)
}
